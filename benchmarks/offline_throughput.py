"""Workload W through LLMEngine against transformers' ``generate`` one by one, in one run.

    python benchmarks/offline_throughput.py

Both in bfloat16 on the same threads, greedy, EOS ignored, prefix cache off, warmed, alternating;
medians.  transformers gets the first 8 requests of W, which its rate does not depend on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from folovllm import LLMEngine, SamplingParams
from machine import describe, pressure
from workload import make_workload

NUM_REFERENCE = 8            # requests for transformers, and for our one stream


class Transformers:
    """``generate``, one request after another."""

    def __init__(self, model_dir: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()

    def run(self, work: list[tuple[list[int], int]]) -> float:
        """Output tokens a second."""
        started_s, count = time.perf_counter(), 0
        for prompt, output_tokens in work:
            ids = self.torch.tensor([prompt])
            with self.torch.inference_mode():
                out = self.model.generate(ids, attention_mask=self.torch.ones_like(ids), do_sample=False, max_new_tokens=output_tokens,
                                          eos_token_id=None, pad_token_id=0)
            assert out.shape[1] - len(prompt) == output_tokens
            count += output_tokens
        return count / (time.perf_counter() - started_s)


def run_engine(engine: LLMEngine, work: list[tuple[list[int], int]], one_by_one: bool = False) -> float:
    """Output tokens a second."""
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False) for _, n in work]
    groups = [[i] for i in range(len(work))] if one_by_one else [list(range(len(work)))]
    started_s, count = time.perf_counter(), 0
    for group in groups:
        outputs = engine.generate([work[i][0] for i in group], [params[i] for i in group])
        count += sum(len(output.outputs[0].token_ids) for output in outputs)
    assert count == sum(n for _, n in work)
    return count / (time.perf_counter() - started_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="times that each is run (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each (default: 2)")
    parser.add_argument("--skip-transformers", action="store_true", help="our figures only")
    arguments = parser.parse_args()
    from gpu_worker.models.default_model import directory

    work = make_workload()
    print(f"{describe()}; CPU pressure before: {pressure():.1f} %")
    rates: dict[str, list[float]] = {"transformers, one by one": [], "FoloVLLM, W": [], "FoloVLLM, one stream": []}
    reference = None if arguments.skip_transformers else Transformers(str(directory()), arguments.threads)
    with LLMEngine(enable_prefix_caching=False, dtype="bfloat16", num_threads=arguments.threads) as engine:
        run_engine(engine, [(prompt, 8) for prompt, _ in work])
        for _ in range(arguments.rounds):
            if reference is not None:
                rates["transformers, one by one"].append(reference.run(work[:NUM_REFERENCE]))
            rates["FoloVLLM, W"].append(run_engine(engine, work))
            rates["FoloVLLM, one stream"].append(run_engine(engine, work[:NUM_REFERENCE], one_by_one=True))
    base = statistics.median(rates["transformers, one by one"]) if reference is not None else None
    print(f"CPU pressure after: {pressure():.1f} %\n\n| engine | output tokens/s (median) | all rounds | ratio |\n|---|---|---|---|")
    for name, values in rates.items():
        if values:
            middle = statistics.median(values)
            ratio = f"{middle / base:.1f}" if base else ""
            print(f"| {name} | {middle:.1f} | {', '.join(f'{v:.1f}' for v in values)} | {ratio} |")


if __name__ == "__main__":
    main()
