"""Same request, same tokens: the same requests under every circumstance, compared as hex.

``python -m tests.integration.determinism_matrix`` runs all of it (16 requests, 64 tokens) and
prints a table, for ``--dtype``, ``--quantization`` and ``--kv-cache-dtype`` as given;
``test_determinism`` runs a reduced one.  What is compared: token ids, logprobs and the best five
logprobs of every position.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from folovllm import LLMEngine, RequestOutput, SamplingParams
from frontend.status import open_pages
from frontend.tokenizer import Tokenizer
from protocol import config

LONGEST_PROMPT = 1200        # tokens
BLOCK = 32                   # tokens
HOG_TOKENS = 32              # output of a hog: it grows from one block to two
BUSY = "import time\nend_s = time.monotonic() + 3600\nwhile time.monotonic() < end_s: pass"

UNCACHED = {"enable_prefix_caching": False}
ARITHMETIC = ["dtype", "quantization", "kv_cache_dtype"]      # settings that choose one: flags of the command line

Print = list[tuple]          # one entry a position: token id, its logprob and the best five, as hex
Record = dict[int, Print]    # by request

REPETITIVE = {"temperature": 0.0, "logit_bias": {40: 100.0}}      # says one token over and over: drafts are right, whatever the model is

# Sampling of request i: every filter, alone and with others.
MIXES: list[dict] = [
    {"temperature": 0.0},
    REPETITIVE,
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.02},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {"temperature": 1.2, "top_p": 0.95, "presence_penalty": 0.5, "logit_bias": {260: 2.0, 28: -3.0}},
    {"temperature": 0.7},
    {"temperature": 0.0, "logit_bias": {30: -100.0}},
    {"temperature": 1.0, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1},
]


@dataclass(frozen=True)
class Workload:
    """The requests that every circumstance sees."""

    prompts: list[list[int]]
    params: list[SamplingParams]
    others: list[list[int]]      # prompts of bystanders

    def __len__(self) -> int:
        return len(self.prompts)


def ordinary_text() -> str:
    """English and code, the same wherever this Python is installed."""
    library = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse.py", "ast.py", "textwrap.py", "heapq.py", "random.py", "string.py", "shutil.py")
    return "\n".join((library / name).read_text(encoding="utf-8")[:30_000] for name in names)


def make_workload(ids: list[int], count: int, max_tokens: int, num_others: int = 63, longest: int = LONGEST_PROMPT) -> Workload:
    """``count`` prompts of 1 … ``longest`` tokens, evenly in the logarithm, cut from ``ids``."""
    lengths = [round(longest ** (i / (count - 1))) for i in range(count)]
    prompts = [ids[997 * i:997 * i + n] for i, n in enumerate(lengths)]
    others = [ids[100 + 613 * i:100 + 613 * i + 1 + (i * 37) % (longest // 6)] for i in range(num_others)]
    params = [SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=5, seed=1000 + i, **MIXES[i % len(MIXES)])
              for i in range(count)]
    return Workload(prompts, params, others)


def print_of(output: RequestOutput) -> Print:
    completion = output.outputs[0]
    return [(token, tuple(sorted((i, entry.logprob.hex(), entry.rank) for i, entry in row.items())))
            for token, row in zip(completion.token_ids, completion.logprobs, strict=True)]


def together(engine: LLMEngine, work: Workload) -> Record:
    outputs = engine.generate(work.prompts, work.params)
    return {i: print_of(output) for i, output in enumerate(outputs)}


def alone(engine: LLMEngine, work: Workload) -> Record:
    return {i: print_of(engine.generate([prompt], params)[0])
            for i, (prompt, params) in enumerate(zip(work.prompts, work.params, strict=True))}


def among_others(engine: LLMEngine, work: Workload, **others: object) -> Record:
    """64 at once: each has 63 others beside it, which sample as ``others`` says."""
    beside = work.others[:64 - len(work)]
    bystander = SamplingParams(max_tokens=work.params[0].max_tokens, ignore_eos=True, seed=5, **{"temperature": 1.0} | others)
    outputs = engine.generate(work.prompts + beside, work.params + [bystander] * len(beside))
    return {i: print_of(outputs[i]) for i in range(len(work))}


def after_prefix_hit(engine: LLMEngine, work: Workload, num_blocks: int | None) -> Record:
    """Each finds ``num_blocks`` of its blocks in the cache (None: all that it may)."""
    one = SamplingParams(max_tokens=1, temperature=0.0)
    record = {}
    for i, (prompt, params) in enumerate(zip(work.prompts, work.params, strict=True)):
        hits = (len(prompt) - 1) // BLOCK if num_blocks is None else num_blocks
        if not 0 < hits <= (len(prompt) - 1) // BLOCK or (num_blocks is None and hits < 2):
            continue
        salt = f"{num_blocks}-{i}"
        engine.generate([{"prompt_token_ids": prompt[:hits * BLOCK + 1], "cache_salt": salt}], one)
        output = engine.generate([{"prompt_token_ids": prompt, "cache_salt": salt}], params)[0]
        if output.num_cached_tokens != hits * BLOCK:
            raise AssertionError(f"request {i} found {output.num_cached_tokens} tokens, not {hits} blocks")
        record[i] = print_of(output)
    return record


def core_counts(engine: LLMEngine) -> dict[str, int]:
    """What the core has counted since its start."""
    page = next(page for page in open_pages(engine.run_dir) if page.get_text("role") == "core")
    return {name: page.get(name) for name in ("steps_done", "tokens", "accepted_tokens")}


def counted(engine: LLMEngine, run: Callable[[], Record]) -> tuple[Record, dict[str, int]]:
    """A record, and what the core counted meanwhile."""
    before = core_counts(engine)
    record = run()
    return record, {name: count - before[name] for name, count in core_counts(engine).items()}


def several_steps_a_plan(engine: LLMEngine, work: Workload) -> Record:
    """Each alone, most of its tokens in plans of four."""
    record, counts = counted(engine, lambda: alone(engine, work))
    if counts["tokens"] < 2 * counts["steps_done"]:
        raise AssertionError(f"{counts['tokens']} tokens in {counts['steps_done']} plans: these were not of several steps")
    return record


def guessed_at(engine: LLMEngine, work: Workload) -> Record:
    """With drafts, some of which are right; and once more among others that repeat themselves, so that drafts pay beside them too."""
    record, counts = counted(engine, lambda: together(engine, work))
    if not counts["accepted_tokens"]:
        raise AssertionError("no draft was right")
    if differing := differences(record, among_others(engine, work, **REPETITIVE)):
        raise AssertionError(f"requests {differing} differ among others")
    return record


def beside_busy(count: int) -> Callable[[LLMEngine, Workload], Record]:
    """``among_others``, while as many threads of others are busy all the time."""
    def run(engine: LLMEngine, work: Workload) -> Record:
        busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
        try:
            return among_others(engine, work)
        finally:
            for each in busy:
                each.kill()
                each.wait()

    return run


def own_blocks(work: Workload) -> int:
    return sum(-(-len(prompt) // BLOCK) for prompt in work.prompts)


def num_hogs(work: Workload) -> int:
    """Requests of a higher priority, as many as the others have blocks, and a few."""
    return own_blocks(work) + 8


def crowded(work: Workload) -> dict:
    """A pool in which all fit at first, and only the hogs when they have grown."""
    return {"num_kv_blocks": num_hogs(work) + own_blocks(work) + 6, "max_num_seqs": num_hogs(work) + len(work),
            "max_model_len": 2048, "max_num_batched_tokens": 8192, "scheduling_policy": "priority"} | UNCACHED


def preempted(engine: LLMEngine, work: Workload) -> Record:
    """Hogs grow until everybody else has lost its blocks."""
    hogs = [((work.others[i % len(work.others)] + work.prompts[-1])[:20 + i % 8]) for i in range(num_hogs(work))]
    hog = SamplingParams(max_tokens=HOG_TOKENS, ignore_eos=True, temperature=1.0, seed=7)
    outputs = engine.generate(hogs + work.prompts, [hog] * len(hogs) + work.params,
                              priority=[0] * len(hogs) + [1] * len(work))[len(hogs):]
    kept = [i for i, output in enumerate(outputs) if not output.metrics.num_preemptions]
    if kept:
        raise AssertionError(f"requests {kept} were not preempted")
    return {i: print_of(output) for i, output in enumerate(outputs)}


@dataclass(frozen=True)
class Circumstance:
    name: str
    settings: Callable[[Workload], dict]
    run: Callable[[LLMEngine, Workload], Record]


def uncached(**more: object) -> Callable[[Workload], dict]:
    return lambda _work: UNCACHED | more


ALONE = Circumstance("alone", uncached(max_decode_steps=1), alone)
CIRCUMSTANCES = [
    Circumstance("among 63 others", uncached(), among_others),
    Circumstance("budget 16", uncached(max_num_batched_tokens=16), together),
    Circumstance("budget 512", uncached(max_num_batched_tokens=512), together),
    Circumstance("prefix hit, one block", lambda _work: {}, lambda engine, work: after_prefix_hit(engine, work, 1)),
    Circumstance("prefix hit, many blocks", lambda _work: {}, lambda engine, work: after_prefix_hit(engine, work, None)),
    Circumstance("preempted", crowded, preempted),
    Circumstance("window 1", uncached(window=1), among_others),
    Circumstance("4 steps a plan", uncached(max_plan_ms=60_000.0, max_num_batched_tokens=2048), several_steps_a_plan),
    Circumstance("speculation", uncached(speculative="ngram", prompt_lookup_min=1), guessed_at),
]

FULL_ONLY = [
    Circumstance("one thread", uncached(num_threads=1), among_others),
    Circumstance("1 thread busy elsewhere", uncached(), beside_busy(1)),
    Circumstance("2 threads busy elsewhere", uncached(), beside_busy(2)),
]


def measure(model: str, circumstances: list[Circumstance], work: Workload, **settings: object) -> Iterator[tuple[str, Record, float]]:
    """(name, record, seconds) of each; neighbours with the same settings share an engine."""
    engine, current = None, None
    try:
        for circumstance in circumstances:
            wanted = circumstance.settings(work) | settings
            if engine is None or wanted != current:
                if engine is not None:
                    engine.close()
                engine, current = LLMEngine(model=model, **wanted), wanted
            started_s = time.monotonic()
            yield circumstance.name, circumstance.run(engine, work), time.monotonic() - started_s
    finally:
        if engine is not None:
            engine.close()


def differences(reference: Record, record: Record) -> list[int]:
    """Requests that differ anywhere."""
    return [i for i, print_ in record.items() if print_ != reference[i]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--requests", type=int, default=16, help="requests compared")
    parser.add_argument("--max-tokens", type=int, default=64, help="output tokens of each")
    config.add_arguments(parser, ARITHMETIC)
    arguments = parser.parse_args()
    model_dir = arguments.model
    if model_dir == "default":
        from gpu_worker.models.default_model import directory
        model_dir = directory()
    work = make_workload(Tokenizer(model_dir).encode(ordinary_text()), arguments.requests, arguments.max_tokens)
    reference, failed = None, False
    padding = "off" if os.environ.get("FOLOVLLM_DISABLE_ROW_PADDING") == "1" else "on"
    print(f"{len(work)} requests, prompts of {min(map(len, work.prompts))} to {max(map(len, work.prompts))} tokens,"
          f" {arguments.max_tokens} output tokens, row padding {padding}\n")
    print("| circumstance | compared | different | seconds |\n|---|---|---|---|")
    chosen = {name: getattr(arguments, name) for name in ARITHMETIC if hasattr(arguments, name)}
    for name, record, seconds in measure(arguments.model, [ALONE, *CIRCUMSTANCES, *FULL_ONLY], work, **chosen):
        reference = reference or record
        different = differences(reference, record)
        failed |= bool(different)
        print(f"| {name} | {len(record)} | {different or 0} | {seconds:.0f} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
