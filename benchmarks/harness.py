"""How every benchmark runs: common flags, engines loaded side by side, rounds that alternate between them.

Only one engine works at a time: peers are stopped between their turns, and before each turn
all loaded engines must have come to rest.  An engine that cannot load, or fails in a round, is
named in the report with the reason, and the others go on.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from engines import Engine, Mode, NotRunning, OurEngine, PeerEngine, Target, parse_mode
from gpu_worker.models.default_model import GGUF_NAME, directory
from machine import tree_cpu_s
from peer_process import DEFAULT_PEERS, PEERS
from report import Case, Report, progress
from workload import Work, make_workload, prefills

RESULTS = Path(__file__).resolve().parent / "results"
BF16, INT8, INT4 = "bf16: dtype=bfloat16", "int8: quantization=int8", "int4: quantization=int4"
REST_SHARE, REST_WINDOW_S, REST_LIMIT_S = 0.05, 0.3, 15.0     # of a core, for so long, waited for at most so long


def parser(doc: str, ours: Iterable[str] = (BF16, INT8, INT4), peers: Iterable[str] = DEFAULT_PEERS, rounds: int = 3,
           max_model_len: int = 2048) -> argparse.ArgumentParser:
    """The flags that all benchmarks share."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--ours", type=parse_mode, action="append", metavar="'NAME: KEY=VALUE ...'",
                      help=f"a mode of ours, flags of launch.py; repeatable (default: {'; '.join(ours)})")
    made.add_argument("--peers", type=Path, metavar="DIR", help="where peers/install.sh has put the peers")
    made.add_argument("--with", dest="chosen", nargs="*", choices=list(PEERS), default=list(peers), metavar="PEER",
                      help=f"which peers, of {', '.join(PEERS)} (default: {' '.join(peers)})")
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each engine (default: all cores)")
    made.add_argument("--rounds", type=int, default=rounds, help=f"times that each is measured (default: {rounds})")
    made.add_argument("--model", type=Path, metavar="DIR", help="checkpoint directory (default: the default model's)")
    made.add_argument("--gguf", type=Path, metavar="FILE", help="the same model for peers that read GGUF (default: beside the checkpoint)")
    made.add_argument("--max-model-len", type=int, default=max_model_len, help=f"of every engine, tokens (default: {max_model_len})")
    made.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="for the JSON file, the plot and the peers' logs")
    made.set_defaults(default_ours=list(ours))
    return made


def modes(arguments: argparse.Namespace) -> list[Mode]:
    return arguments.ours or [parse_mode(text) for text in arguments.default_ours]


def target(arguments: argparse.Namespace) -> Target:
    checkpoint = (arguments.model or directory()).absolute()
    return Target(checkpoint, (arguments.gguf or checkpoint / GGUF_NAME).absolute(), arguments.threads, arguments.max_model_len,
                  is_default=arguments.model is None)


def engines(arguments: argparse.Namespace) -> list[Engine]:
    """Peers first: ours are compared with them."""
    logs = arguments.out / "logs"
    peers = [PeerEngine(PEERS[name], arguments.peers, logs) for name in arguments.chosen]
    return [*peers, *(OurEngine(mode) for mode in modes(arguments))]


def new_report(name: str, case_name: str, metrics: list[Any], arguments: argparse.Namespace, **options: Any) -> Report:
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()
             if key not in ("ours", "default_ours")}
    shown["ours"] = {mode.name: mode.flags for mode in modes(arguments)}
    return Report(name, case_name, metrics, shown, bases=[PEERS[peer].title for peer in arguments.chosen], **options)


class Session:
    """The engines of one run; use it in a ``with`` block."""

    def __init__(self, arguments: argparse.Namespace, report: Report, chosen: list[Engine] | None = None) -> None:
        self.arguments, self.report, self.target = arguments, report, target(arguments)
        self.engines = engines(arguments) if chosen is None else chosen

    def load(self, width: int, serving: bool = False, warm: bool = True) -> None:
        """All engines anew, for ``width`` requests at once; with ``warm`` each has run once when it is measured."""
        for engine in list(self.engines):
            progress(f"loading {engine.name} for {width} at once")
            started_s = time.perf_counter()
            try:
                about = engine.load(self.target, width, serving)
                if warm:
                    engine.run([(prompt, 4) for prompt, _ in make_workload(2, seed=99)])
            except NotRunning as error:
                self.drop(engine, str(error))
                continue
            self.report.engines[engine.name] = about | {"load_s": round(time.perf_counter() - started_s, 1)}

    def alternate(self, case: Case, measure: Callable[[Engine], dict[str, float]], warm_ups: int = 0) -> None:
        """``measure`` every engine in every round; metric → value goes into the report.

        The order turns round with each round, so that a drift of the machine favours nobody.
        ``warm_ups`` rounds before them do not count: they compile what a first run of a size does.
        """
        for number in range(-warm_ups, self.arguments.rounds):
            for engine in list(self.engines) if number % 2 == 0 else list(reversed(self.engines)):
                if number < 0 and engine.one_at_a_time:
                    continue
                self.come_to_rest()
                which = f"round {number + 1}" if number >= 0 else "warm-up"
                progress(f"{self.report.name}, {self.report.case_name} {case}, {which}: {engine.name}")
                before_s, started_s = self._others_cpu_s(engine), time.monotonic()
                try:
                    values = measure(engine)
                except NotRunning as error:
                    self.drop(engine, f"at {self.report.case_name} {case}: {error}")
                    continue
                if number >= 0:
                    self._check_others(engine, before_s, time.monotonic() - started_s)
                    for metric, value in values.items():
                        self.report.add(case, engine.name, metric, value, number)

    def come_to_rest(self) -> None:
        """Until no loaded engine computes; says so in the report when one does not stop."""
        deadline_s = time.monotonic() + REST_LIMIT_S
        while any(engine.pid() is not None for engine in self.engines):
            before_s = self._others_cpu_s(None)
            time.sleep(REST_WINDOW_S)
            share = (self._others_cpu_s(None) - before_s) / REST_WINDOW_S
            if share < REST_SHARE:
                return
            if time.monotonic() > deadline_s:
                self.report.note(f"an idle engine used {share:.0%} of a core when a round began")
                return

    def drop(self, engine: Engine, reason: str) -> None:
        """No more of it in this run."""
        progress(f"{engine.name} does not run: {reason}")
        self.report.missing[engine.name] = reason
        self.engines.remove(engine)
        engine.close()

    def close(self) -> None:
        for engine in self.engines:
            engine.close()

    def __enter__(self) -> Session:
        self._on_sigterm = signal.signal(signal.SIGTERM, signal.default_int_handler)     # so that engines are closed
        return self

    def __exit__(self, *_: object) -> None:
        self.report.watch.end()
        self.close()
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _others_cpu_s(self, engine: Engine | None) -> float:
        return sum(tree_cpu_s(other.pid()) for other in self.engines if other is not engine and other.pid() is not None)

    def _check_others(self, engine: Engine, before_s: float, seconds: float) -> None:
        share = (self._others_cpu_s(engine) - before_s) / seconds
        if share > REST_SHARE:
            self.report.note(f"while {engine.name} was measured, the engines loaded beside it used {share:.0%} of a core")


def whole_and_decode(engine: Engine, work: Work, whole: str, decode: str) -> dict[str, float]:
    """Output tokens a second of ``work`` one by one: all of it, and without the time of its prefills."""
    first = engine.run(prefills(work), one_by_one=True)
    result = engine.run(work, one_by_one=True)
    return {whole: result.rate} | positive(decode, sum(result.counts) - len(work), result.seconds - first.seconds)


def positive(metric: str, tokens: int, seconds: float) -> dict[str, float]:
    """A rate from a difference of two times; nothing where noise made it vanish."""
    return {metric: tokens / seconds} if seconds > 0 and tokens > 0 else {}
