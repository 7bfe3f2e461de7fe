"""The offline engine: ``LLMEngine`` starts its own private processes and talks to them.

``LLM`` is vLLM's spelling of the same.  Everything after the start is a ``Client``; each
thread that generates has its own.  The engine ends with ``close``, with its ``with``
block, with the program, however that ends.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from frontend.client import Client, Params
from frontend.engine_process import EngineProcess
from frontend.errors import EngineError
from frontend.outputs import RequestOutput
from frontend.prompts import Messages, Prompt, conversations, prompt_list
from protocol import config as settings
from protocol.config import ConfigError, EngineConfig, ModelConfig, SchedulerConfig


class LLMEngine:
    """A model with engine of its own.

    ``model_config``, ``scheduler_config`` and every flag of launch.py as a keyword:
    ``LLMEngine(ModelConfig(model="default"), max_num_seqs=8, window=2)``.  A keyword wins
    over the structs, these over the environment.  ``seed`` makes all its outputs repeatable.
    """

    def __init__(self, model_config: ModelConfig | None = None, scheduler_config: SchedulerConfig | None = None,
                 **flags: Any) -> None:
        config = engine_config(model_config, scheduler_config, flags)
        process = EngineProcess(config)
        self.run_dir, self.facts = process.run_dir, process.facts
        self._seed = config.model.seed
        self._clients = threading.local()
        self._stop = weakref.finalize(self, process.stop)     # also at exit, and when forgotten
        self._client()

    def generate(self, prompts: Prompt | Sequence[Prompt], params: Params = None, *,
                 priority: int | Sequence[int] = 0, use_tqdm: bool = True) -> list[RequestOutput]:
        """Continue all prompts, as they stand; results in their order."""
        with _Progress(len(prompt_list(prompts)), use_tqdm) as progress:
            return self._client().generate(prompts, params, priority=priority, on_finish=progress.step)

    def generate_batch(self, prompts: Prompt | Sequence[Prompt], params: Params = None, *,
                       request_ids: Sequence[str] | None = None, priority: int | Sequence[int] = 0,
                       use_tqdm: bool = True) -> dict[str, RequestOutput]:
        """Answer all prompts: a string is a user turn through the model's chat template,
        token ids go in raw.  By request id, in the order of the prompts."""
        with _Progress(len(prompt_list(prompts)), use_tqdm) as progress:
            return self._client().generate_batch(prompts, params, request_ids=request_ids, priority=priority,
                                                 on_finish=progress.step)

    def chat(self, messages: Messages | Sequence[Messages] | str, params: Params = None, *,
             use_tqdm: bool = True) -> list[RequestOutput]:
        """Answer one conversation or several.  Without params an answer may take all of the context."""
        with _Progress(len(conversations(messages)), use_tqdm) as progress:
            return self._client().chat(messages, params, stream=False, on_finish=progress.step)

    def stream(self, prompt: Prompt, params: Any = None, **options: Any) -> Any:
        """The deltas of one prompt as they come (``Client.stream``)."""
        return self._client().stream(prompt, params, **options)

    def close(self) -> None:
        """End the engine's processes; nothing in a forked child."""
        client = getattr(self._clients, "client", None)
        if client is not None:
            client.close()
        self._stop()

    def __enter__(self) -> "LLMEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _client(self) -> Client:
        """This thread's."""
        if not self._stop.alive:
            raise EngineError("this engine is closed")
        client = getattr(self._clients, "client", None)
        if client is None:
            client = self._clients.client = Client(self.run_dir, seed=self._seed)
        return client


class LLM(LLMEngine):
    """vLLM's spelling: ``LLM("default", max_model_len=2048, seed=0)``."""

    def __init__(self, model: str = "default", **flags: Any) -> None:
        super().__init__(model=model, **flags)


def engine_config(model_config: ModelConfig | None, scheduler_config: SchedulerConfig | None,
                  flags: dict[str, Any]) -> EngineConfig:
    """The settings of keywords, structs and environment, in this order of weight."""
    values: dict[str, Any] = {}
    for name, config, kind in (("model_config", model_config, ModelConfig),
                               ("scheduler_config", scheduler_config, SchedulerConfig)):
        if config is None:
            continue
        if not isinstance(config, kind):
            raise ConfigError(f"{name}: was {type(config).__name__}; allowed: {kind.__name__}")
        # A struct cannot tell a default from a choice of the same value: only the others count.
        values |= {field: value for field, value in msgspec.structs.asdict(config).items()
                   if value != getattr(kind(), field)}
    values |= flags
    settings.from_values(values)      # unknown names are refused here
    # The environment's run directory is that of a shared engine; this one is private.
    environ = {name: value for name, value in os.environ.items() if name != "FOLOVLLM_RUN_DIR"}
    return settings.from_arguments(argparse.Namespace(**values), environ)


class _Progress:
    """A bar on a terminal's stderr: requests done, output tokens per second."""

    def __init__(self, total: int, wanted: bool) -> None:
        self._total, self._bar = total, None
        self._wanted = wanted and total > 0 and sys.stderr.isatty()
        self._tokens = 0
        self.step: Callable[[RequestOutput], None] | None = self._step if self._wanted else None

    def __enter__(self) -> "_Progress":
        if self._wanted:
            # Imported where a bar is drawn: the SDK itself must import quickly.
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("{task.fields[rate]}"), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, rate="")
        return self

    def _step(self, output: RequestOutput) -> None:
        self._tokens += sum(len(completion.token_ids) for completion in output.outputs)
        elapsed_s = self._bar.tasks[0].elapsed or 0.0
        rate = f"{self._tokens / elapsed_s:.0f} output tokens/s" if elapsed_s else ""
        self._bar.update(self._task, advance=1, rate=rate)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
