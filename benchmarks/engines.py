"""The engines of a benchmark, ours and the peers, behind one interface.

``load`` for a width (requests at once), ``run`` a list of requests, ``close``.  Prefix caches
are off, sampling is greedy, EOS is ignored: every engine computes the same positions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from child import Child, ChildFailed
from frontend.errors import EngineError
from frontend.llm_engine import LLMEngine
from peer_process import Peer
from protocol import config as settings
from protocol.config import ConfigError
from protocol.sampling_params import SamplingParams
from workload import Work

LOAD_TIMEOUT_S, RUN_TIMEOUT_S = 1800.0, 3600.0


class NotRunning(RuntimeError):
    """An engine that cannot take part; the message is the reason in the report."""


@dataclass(frozen=True, slots=True)
class Target:
    """What all engines of a run share."""

    checkpoint: Path              # safetensors directory
    gguf: Path                    # the same model as GGUF
    threads: int
    max_model_len: int            # tokens
    is_default: bool = False      # the checkpoint is the default model's: ours finds it by itself


@dataclass(frozen=True, slots=True)
class Result:
    """Of one run of a list of requests."""

    seconds: float
    counts: list[int]                         # output tokens of each
    token_ids: list[list[int]] | None         # None where the engine does not tell them

    @property
    def rate(self) -> float:
        """Output tokens a second."""
        return sum(self.counts) / self.seconds


class Engine(Protocol):
    """One engine in one mode."""

    name: str
    is_ours: bool
    one_at_a_time: bool           # it has no batches: a few requests give its rate

    def load(self, target: Target, width: int, serving: bool = False) -> dict[str, Any]:
        """Ready for ``width`` requests at once; what it says of itself.  Raises NotRunning."""
        ...

    def run(self, work: Work, one_by_one: bool = False) -> Result:
        """All at once, or each after the one before.  Raises NotRunning."""
        ...

    def pid(self) -> int | None:
        """Of the process that everything else of it descends from."""
        ...

    def close(self) -> None:
        ...


@dataclass(frozen=True, slots=True)
class Mode:
    """A name and the settings of our engine that it stands for."""

    name: str
    flags: dict[str, Any]


def parse_mode(text: str) -> Mode:
    """"int8: quantization=int8 kv-cache-dtype=int8" → Mode; ArgumentTypeError says what is wrong."""
    name, colon, rest = text.partition(":")
    pairs = [part.partition("=") for part in rest.split()]
    if not colon or not name.strip() or any(not equals for _, equals, _ in pairs):
        raise argparse.ArgumentTypeError(f"was {text!r}; allowed: 'NAME: key=value key=value', keys as launch.py's flags")
    values = {key.lstrip("-").replace("-", "_"): value for key, _, value in pairs}
    known = settings.fields()
    for key in values:
        if key not in known:
            raise argparse.ArgumentTypeError(f"{name.strip()}: this engine has no setting {key!r}; it has: {', '.join(sorted(known))}")
    try:
        config = settings.from_arguments(argparse.Namespace(), {f"FOLOVLLM_{key.upper()}": value for key, value in values.items()})
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{name.strip()}: {error}") from None
    return Mode(name.strip(), {key: getattr(getattr(config, known[key][0]), key) for key in values})


class OurEngine:
    """FoloVLLM through ``LLMEngine``, in one mode."""

    is_ours, one_at_a_time = True, False

    def __init__(self, mode: Mode) -> None:
        self.name, self.mode = mode.name, mode
        self.engine: LLMEngine | None = None

    def flags(self, target: Target, width: int) -> dict[str, Any]:
        """Keywords of LLMEngine, flags of launch.py: the mode's win."""
        return {"model": "default" if target.is_default else str(target.checkpoint), "enable_prefix_caching": False, "num_threads": target.threads,
                "max_model_len": target.max_model_len, "max_num_seqs": width} | self.mode.flags

    def load(self, target: Target, width: int, serving: bool = False) -> dict[str, Any]:
        self.close()
        flags = self.flags(target, width)
        try:
            self.engine = LLMEngine(**flags)
        except (EngineError, ConfigError) as error:
            raise NotRunning(str(error)) from None
        facts = self.engine.facts
        return {"flags": flags, "dtype": facts["dtype"], "threads": facts["threads"], "kv_tokens": facts["kv_tokens"]}

    def run(self, work: Work, one_by_one: bool = False) -> Result:
        params = [SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, detokenize=False) for _, count in work]
        groups = [[i] for i in range(len(work))] if one_by_one else [list(range(len(work)))]
        started_s, token_ids = time.perf_counter(), []
        try:
            for group in groups:
                outputs = self.engine.generate([work[i][0] for i in group], [params[i] for i in group], use_tqdm=False)
                token_ids += [output.outputs[0].token_ids for output in outputs]
        except EngineError as error:
            raise NotRunning(str(error)) from None
        return checked(Result(time.perf_counter() - started_s, [len(ids) for ids in token_ids], token_ids), work)

    def pid(self) -> int | None:
        return None if self.engine is None else self.engine.facts["pid"]

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
            self.engine = None


class PeerEngine:
    """A peer in a process and a virtual environment of its own."""

    is_ours = False

    def __init__(self, peer: Peer, directory: Path | None, logs: Path) -> None:
        self.peer, self.name, self.one_at_a_time = peer, peer.title, peer.one_at_a_time
        self._directory, self._logs = directory, logs
        self._child: Child | None = None

    def start(self) -> None:
        """The process, with nothing loaded."""
        reason = self.peer.why_not(self._directory)
        if reason is not None:
            raise NotRunning(reason)
        self._child = Child(self.peer.command(self._directory), self.peer.environment(self._directory),
                            self._logs / f"{self.peer.name}.log")

    def load(self, target: Target, width: int, serving: bool = False) -> dict[str, Any]:
        if self._child is None:
            self.start()
        return self._ask("load", LOAD_TIMEOUT_S, checkpoint=str(target.checkpoint), gguf=str(target.gguf), threads=target.threads,
                         max_model_len=target.max_model_len, width=width, serving=serving, **self.peer.options)

    def run(self, work: Work, one_by_one: bool = False) -> Result:
        answer = self._ask("run", RUN_TIMEOUT_S, prompts=[prompt for prompt, _ in work], output_tokens=[n for _, n in work],
                           one_by_one=one_by_one)
        return checked(Result(**answer), work)

    def serve(self, work: Work, due_s: Sequence[float]) -> list[list[float]]:
        """For each request the times of its tokens, s since the start."""
        return self._ask("serve", RUN_TIMEOUT_S, prompts=[prompt for prompt, _ in work], output_tokens=[n for _, n in work],
                         due_s=list(due_s))["times_s"]

    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def _ask(self, op: str, timeout_s: float, **fields: Any) -> Any:
        try:
            return self._child.ask(op, timeout_s, **fields)
        except ChildFailed as error:
            self.close()
            raise NotRunning(str(error)) from None


def checked(result: Result, work: Work) -> Result:
    """Every engine must have done all of the work, or its rate means nothing."""
    asked = [count for _, count in work]
    if result.counts != asked:
        wrong = next(i for i, (got, want) in enumerate(zip(result.counts, asked)) if got != want)
        raise NotRunning(f"gave {result.counts[wrong]} tokens for request {wrong} instead of {asked[wrong]}")
    return result
