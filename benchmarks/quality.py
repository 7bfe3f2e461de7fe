"""What a mode costs in quality: perplexity, and how often it would choose the same next token.

    python benchmarks/quality.py

Ordinary text in windows of 1,024 tokens, Python's licence and library sources and beside them other
licences, which the model finds harder, goes through the engine with prompt_logprobs=1: the logprob of each token that comes next, and the most likely one,
from the engine's own float32 logits.  Every mode is compared with the float32 model; the default
model came as 4-bit blocks, so for int4 too these are the same weights.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from engines import Mode, parse_mode
from folovllm import LLMEngine, SamplingParams
from frontend.tokenizer import Tokenizer
from gpu_worker.models.default_model import directory
from harness import RESULTS
from report import Metric, Report, progress

LICENCES = ("GPL-3", "MPL-2.0", "LGPL-2.1", "Apache-2.0", "Artistic", "GFDL-1.3")      # of /usr/share/common-licenses
SOURCES = ("argparse.py", "statistics.py", "tarfile.py", "ast.py", "shutil.py", "inspect.py", "random.py", "textwrap.py", "difflib.py",
           "fractions.py")
REFERENCE = "float32: dtype=float32"
OURS = ("bfloat16: dtype=bfloat16", "int8: quantization=int8", "int8, int8 KV: quantization=int8 kv-cache-dtype=int8",
        "int4: quantization=int4", "int4, int8 KV: quantization=int4 kv-cache-dtype=int8")
METRICS = [Metric("perplexity", "e to the mean loss", higher_is_better=False, digits=4), Metric("change", "%", higher_is_better=False, digits=2),
           Metric("standard error of the change", "%", higher_is_better=False, digits=2), Metric("same next token", "%", digits=2),
           Metric("duration", "s", higher_is_better=False, digits=0)]


@dataclass(frozen=True, slots=True)
class Measured:
    """One mode on all windows."""

    losses: np.ndarray         # float64 [windows, tokens - 1]: −logprob of the token that comes
    choices: np.ndarray        # int64, likewise: the most likely token
    seconds: float             # of all windows

    def part(self, windows: slice) -> Measured:
        return Measured(self.losses[windows], self.choices[windows], self.seconds)

    @property
    def perplexity(self) -> float:
        return math.exp(self.losses.mean())

    def change(self, reference: Measured) -> float:
        """Of the perplexity, percent."""
        return 100 * math.expm1((self.losses - reference.losses).mean())

    def change_error(self, reference: Measured) -> float:
        """Standard error of ``change``, from the windows, percent."""
        by_window = (self.losses - reference.losses).mean(axis=1)
        return 100 * float(by_window.std(ddof=1)) / math.sqrt(len(by_window)) if len(by_window) > 1 else math.nan

    def agreement(self, reference: Measured) -> float:
        """Percent of all positions."""
        return 100 * float((self.choices == reference.choices).mean())


def documents(folder: Path, names: Sequence[str]) -> list[str]:
    """Those that this machine has."""
    return [(folder / name).read_text(encoding="utf-8") for name in names if (folder / name).is_file()]


def windows(documents: list[list[int]], count: int, length: int) -> list[list[int]]:
    """``count`` pieces of ``length`` tokens: the first of each document, then the second of each …"""
    pieces = [[ids[first:first + length] for first in range(0, len(ids) - length + 1, length)] for ids in documents]
    longest = max(map(len, pieces), default=0)
    in_turn = [of_one[i] for i in range(longest) for of_one in pieces if i < len(of_one)]
    if len(in_turn) < count:
        raise SystemExit(f"error: there is text for {len(in_turn)} windows of {length} tokens here; {count} are asked for")
    return in_turn[:count]


def ordinary_texts(model_dir: Path, count: int, count_others: int, length: int) -> dict[str, list[list[int]]]:
    """Windows by the name of their text."""
    tokenizer, library = Tokenizer(model_dir), Path(sysconfig.get_paths()["stdlib"])

    def cut(folder: Path, names: Sequence[str], wanted: int) -> list[list[int]]:
        return windows([tokenizer.encode(text) for text in documents(folder, names)], wanted, length)

    of_licence = min(2, count)
    texts = {"Python's licence and library": cut(library, ["LICENSE.txt"], of_licence) + cut(library, SOURCES, count - of_licence),
             "other licences": cut(Path("/usr/share/common-licenses"), LICENCES, count_others)}
    return {name: found for name, found in texts.items() if found}


def measure(mode: Mode, work: list[list[int]], threads: int | None, model: str) -> Measured:
    """One engine, one window after another."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
    losses, choices = [], []
    flags = {"model": model, "num_threads": threads, "max_num_seqs": 1, "max_model_len": len(work[0]) + 1, "enable_prefix_caching": False}
    with LLMEngine(**flags | mode.flags) as engine:
        started_s = time.perf_counter()
        for number, ids in enumerate(work):
            rows = engine.generate([ids], params, use_tqdm=False)[0].prompt_logprobs[1:]
            losses.append([-row[token].logprob for token, row in zip(ids[1:], rows, strict=True)])
            choices.append([next(token for token, entry in row.items() if entry.rank == 1) for row in rows])
            progress(f"quality, {mode.name}: window {number + 1} of {len(work)}")
        return Measured(np.array(losses), np.array(choices), time.perf_counter() - started_s)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=parse_mode, action="append", metavar="'NAME: KEY=VALUE ...'",
                        help=f"a mode, flags of launch.py; repeatable (default: {'; '.join(OURS)})")
    parser.add_argument("--windows", type=int, default=30, help="pieces of Python's text (default: 30, which makes 30,690 predictions)")
    parser.add_argument("--other-windows", type=int, default=10, help="of the other licences (default: 10)")
    parser.add_argument("--tokens", type=int, default=1024, help="of a window (default: 1024)")
    parser.add_argument("--threads", type=int, help="of the worker (default: all cores)")
    parser.add_argument("--model", default="default", help="'default', or a checkpoint directory")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="for the JSON file and the plot")
    return parser.parse_args()


def add(report: Report, text: str, mode: str, found: Measured, reference: Measured) -> None:
    values = (found.perplexity, found.change(reference), found.change_error(reference), found.agreement(reference), found.seconds)
    for metric, value in zip(METRICS, values, strict=True):
        report.add(text, mode, metric.name, value)
    progress(f"quality, {mode}, {text}: perplexity {found.perplexity:.4f}, {values[1]:+.2f} % (± {values[2]:.2f}), agreement {values[3]:.2f} %")


def main() -> None:
    arguments = parse()
    model_dir = directory() if arguments.model == "default" else Path(arguments.model)
    texts = ordinary_texts(model_dir, arguments.windows, arguments.other_windows, arguments.tokens)
    work = [ids for found in texts.values() for ids in found]
    digest = hashlib.sha256(np.array(work, dtype="<i4").tobytes()).hexdigest()[:16]
    shown = {name: str(value) for name, value in vars(arguments).items() if name != "ours"}
    report = Report("quality", "text", METRICS, shown, wide=True)
    report.note(f"{sum(map(len, work)):,} tokens in {len(work)} windows; sha256 of their ids {digest}…")
    reference = None
    for mode in (parse_mode(REFERENCE), *(arguments.ours or map(parse_mode, OURS))):
        found = measure(mode, work, arguments.threads, arguments.model)
        reference = reference or found
        report.engines[mode.name] = mode.flags
        first = 0
        for name, pieces in texts.items():
            part = slice(first, first + len(pieces))
            add(report, name, mode.name, found.part(part), reference.part(part))
            first = part.stop
    report.finish(arguments.out)


if __name__ == "__main__":
    main()
