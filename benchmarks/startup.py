"""Start to first token: a new process, the model, one token of a 16-token prompt; ours beside the peers.

    python benchmarks/startup.py --peers DIR

Ours is ``python launch.py`` until a waiting client holds the token; a peer is its Python until
the token is there.  Cases: warm (files in the page cache), cold (page cache dropped, which takes
root), and for ours the very first start, with a cache directory of its own: download, conversion
and compilation included.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
import harness
from engines import Engine, NotRunning, OurEngine, Target
from folovllm import Client, SamplingParams
from frontend.errors import EngineError
from peer_process import DEFAULT_PEERS
from protocol import config as settings
from report import Metric, Report, progress
from workload import make_equal

FIRST_TOKEN, READY = Metric("first token", "s", higher_is_better=False, digits=2), Metric("ready", "s", higher_is_better=False, digits=2)
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
PROMPT, WIDTH = make_equal(1, 16, 1, seed=0), 64
STOP_S = 15.0


def drop_page_cache() -> None:
    """Raises OSError where that is not allowed."""
    os.sync()
    DROP_CACHES.write_text("3")


def our_times(engine: OurEngine, target: Target, first_start: bool = False) -> dict[str, float]:
    """Seconds to the ready line and to the first token."""
    flags = engine.flags(target, WIDTH)
    with tempfile.TemporaryDirectory(prefix="folovllm-") as private:
        env = dict(os.environ)
        if first_start:
            env["FOLOVLLM_CACHE_DIR"] = f"{private}/cache"
        config = settings.from_values(flags | {"run_dir": f"{private}/run"})
        started_s = time.perf_counter()
        with open(f"{private}/log", "wb") as log:
            process = subprocess.Popen([sys.executable, str(ROOT / "launch.py"), *settings.to_arguments(config)], env=env,
                                       stdout=subprocess.PIPE, stderr=log)
        try:
            if not process.stdout.readline():
                said = Path(f"{private}/log").read_text(errors="replace").strip().splitlines()
                raise NotRunning(said[-1] if said else "it ended before it was ready")
            ready_s = time.perf_counter() - started_s
            with Client(f"{private}/run") as client, client.stream(PROMPT[0][0], SamplingParams(max_tokens=1, temperature=0)) as stream:
                next(stream)
                return {READY.name: ready_s, FIRST_TOKEN.name: time.perf_counter() - started_s}
        except EngineError as error:
            raise NotRunning(str(error)) from None
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def times(engine: Engine, target: Target) -> dict[str, float]:
    """Of either kind, from nothing to nothing."""
    if isinstance(engine, OurEngine):
        return our_times(engine, target)
    started_s = time.perf_counter()
    try:
        engine.load(target, WIDTH)
        ready_s = time.perf_counter() - started_s
        engine.run(PROMPT, one_by_one=True)
        return {READY.name: ready_s, FIRST_TOKEN.name: time.perf_counter() - started_s}
    finally:
        engine.close()


class Starts:
    """Rounds over all engines; one that fails is named and left out."""

    def __init__(self, arguments: argparse.Namespace, report: Report) -> None:
        self.report, self.rounds, self.target = report, arguments.rounds, harness.target(arguments)
        self.engines = harness.engines(arguments)

    def measure(self, case: str, start: Callable[[Engine], dict[str, float]], before: Callable[[], None] | None = None,
                rounds: int | None = None, only_ours: bool = False) -> None:
        for number in range(rounds or self.rounds):
            for engine in [e for e in self.engines if e.is_ours or not only_ours]:
                progress(f"startup, {case}, round {number + 1}: {engine.name}")
                if before is not None:
                    before()
                try:
                    values = start(engine)
                except NotRunning as error:
                    self.report.missing[engine.name] = str(error)
                    self.engines.remove(engine)
                    continue
                self.report.engines.setdefault(engine.name, {})
                for metric, value in values.items():
                    self.report.add(case, engine.name, metric, value, number)


def main() -> None:
    parser = harness.parser(__doc__, peers=DEFAULT_PEERS)
    parser.add_argument("--cases", nargs="+", choices=["warm", "cold", "first"], default=["warm", "cold", "first"])
    parser.add_argument("--first-rounds", type=int, default=1, help="very first starts of each mode of ours; each downloads the model (default: 1)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)     # so that the engine under way is closed
    report = harness.new_report("startup", "case", [FIRST_TOKEN, READY], arguments)
    starts = Starts(arguments, report)
    if set(arguments.cases) - {"first"}:
        for engine in starts.engines:
            if engine.is_ours:           # it makes what files of its mode are missing
                progress(f"startup: one start of {engine.name} that does not count")
                start_once(engine, starts.target)
    if "warm" in arguments.cases:
        starts.measure("warm", lambda engine: times(engine, starts.target))
    if "cold" in arguments.cases:
        try:
            drop_page_cache()
            starts.measure("page cache dropped", lambda engine: times(engine, starts.target), before=drop_page_cache)
        except OSError as error:
            report.note(f"no cold starts: the page cache could not be dropped ({error}); it takes root")
    if "first" in arguments.cases:
        if not starts.target.is_default:
            report.note("no very first starts: they are of the default model")
        else:
            starts.measure("very first", lambda engine: our_times(engine, starts.target, first_start=True),
                           rounds=arguments.first_rounds, only_ours=True)
    report.finish(arguments.out)


def start_once(engine: OurEngine, target: Target) -> None:
    """Converts and compiles what later starts find; a failure shows in the first round."""
    try:
        our_times(engine, target)
    except NotRunning:
        pass


if __name__ == "__main__":
    main()
