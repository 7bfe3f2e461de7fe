"""Generate for many prompts at once; with ``--compare-sequential`` one after another too.

    python examples/batch_inference.py --num-prompts 16 --max-tokens 64 --compare-sequential
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # from a clone, installed or not
from folovllm import BadRequest, ConfigError, EngineNotRunning, LLMEngine, ModelConfig, SamplingParams

QUESTIONS = [
    "What is the capital of France?", "Write a haiku about AI.", "Why is the sky blue?", "Name three prime numbers.",
    "Explain gravity to a child.", "What does a compiler do?", "Give a recipe for pancakes.", "Who wrote Hamlet?",
]


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"was {value}; allowed: at least 1")
    return value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--num-prompts", type=positive, default=8, metavar="N", help="built-in questions, repeated (default: 8)")
    which.add_argument("--prompts", nargs="+", metavar="TEXT", help="your own")
    parser.add_argument("--max-tokens", type=positive, default=64, help="most new tokens of each (default: 64)")
    parser.add_argument("--model", default="default", help="'default', a directory, a GGUF file or a hub id (default: default)")
    parser.add_argument("--compare-sequential", action="store_true", help="run the same prompts one after another too")
    return parser.parse_args()


def timed(run) -> tuple[list, float]:
    started_s = time.perf_counter()
    outputs = run()
    return outputs, time.perf_counter() - started_s


def report(name: str, outputs: list, seconds: float) -> None:
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(f"{name:<12} {seconds:7.2f} s  {tokens:6d} tokens  {tokens / seconds:8.1f} tokens/s")


def main() -> None:
    arguments = parse()
    prompts = arguments.prompts or [QUESTIONS[i % len(QUESTIONS)] for i in range(arguments.num_prompts)]
    params = SamplingParams(max_tokens=arguments.max_tokens, temperature=0)
    # Without the prefix cache neither run profits from the other.
    with LLMEngine(ModelConfig(model=arguments.model), enable_prefix_caching=False) as engine:
        engine.generate_batch(prompts[:1], SamplingParams(max_tokens=2, temperature=0))    # warm
        batch, batch_s = timed(lambda: list(engine.generate_batch(prompts, params).values()))
        for output in batch:
            print(f"{output.prompt} -> {output.outputs[0].text}\n")
        report("batch", batch, batch_s)
        if arguments.compare_sequential:
            one_by_one, sequential_s = timed(
                lambda: [output for prompt in prompts for output in engine.generate_batch([prompt], params).values()])
            report("sequential", one_by_one, sequential_s)
            same = all(a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in zip(batch, one_by_one, strict=True))
            print(f"speedup      {sequential_s / batch_s:7.2f} x  {'the same' if same else 'DIFFERENT'} tokens")


if __name__ == "__main__":
    try:
        main()
    except (BadRequest, ConfigError, EngineNotRunning) as error:
        sys.exit(f"error: {error}")
