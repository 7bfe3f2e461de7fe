"""Core and worker in one process, without sockets, and the logits that every token was taken from.

The core is the real ``EngineCore``, its plans and the results go through the real codec, the
runner is the worker's.  The model stands behind a wrapper that keeps what ``compute_logits``
returned to the runner.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core_proc.engine_core import EngineCore
from gpu_worker.kv_cache import KVCache
from gpu_worker.model_runner import ModelRunner
from gpu_worker.models.spec import LoadedModel
from gpu_worker.request_states import RequestStates
from gpu_worker.row_buckets import RowBuckets
from protocol.codec import BLOCK_SIZE_TOKENS, i32_bytes, i32_column
from protocol.config import SchedulerConfig
from protocol.messages import Accepted, Add
from protocol.sampling_params import TokenParams
from protocol.steps import StepResult, StepStatus, WorkerReady, to_core, to_worker

FRONTEND = b"f0.e1"


@dataclass
class Continuation:
    """One request: what went in, what came out, and from which logits."""

    prompt: list[int]
    token_ids: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)    # float32 [vocab_size] for each token
    chunks: list[int] = field(default_factory=list)       # tokens of each step that computed a part of the prompt


class KeptLogits:
    """The model, with a copy of the logits that it returned last."""

    def __init__(self, model: LoadedModel) -> None:
        self._model, self.spec, self.picker, self.last = model, model.spec, model.picker, torch.empty(0)

    def forward(self, *arguments: Any) -> Tensor:
        return self._model.forward(*arguments)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits = self._model.compute_logits(hidden)
        self.last = logits.clone()       # the sampler may change its own
        return logits


class InProcessEngine:
    """One model and one core; ``generate`` runs requests as one batch."""

    def __init__(self, model: LoadedModel, *, max_model_len: int, num_blocks: int, **scheduler: Any) -> None:
        config = SchedulerConfig(max_decode_steps=1, **scheduler)      # the logits of each step are kept
        spec, device = model.spec, torch.device("cpu")
        kv = KVCache(spec, num_blocks, spec.kv_dtype, device)
        kv.fill_with_nan()      # what was never written is never read
        states = RequestStates(config.max_num_seqs, max_model_len, spec.vocab_size, num_blocks, device)
        self._model = KeptLogits(model)
        self._runner = ModelRunner(self._model, kv, states, RowBuckets())
        self._core = EngineCore(config, WorkerReady(1, 1, "f", num_blocks, config.max_num_seqs, spec.vocab_size,
                                                    i32_bytes(spec.eos_token_ids), [], max_model_len))
        self._core.connect(FRONTEND, 1)
        self._streams: dict[int, Continuation] = {}
        self._now_ns = 1
        self.rows_per_step: list[int] = []

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[Continuation]:
        """Greedy, EOS ignored; all requests are there before the first step."""
        self._streams = {number: Continuation(prompt) for number, prompt in enumerate(prompts)}
        for number, prompt in enumerate(prompts):
            self._add(number, prompt, TokenParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True))
        accepted = [m for _, m in self._core.take_outputs() if isinstance(m, Accepted)]
        assert len(accepted) == len(prompts)
        while self._core.wants_plan(self._now_ns):
            self._step()
        assert all(len(stream.token_ids) == max_tokens for stream in self._streams.values())
        return list(self._streams.values())

    def _add(self, number: int, prompt: list[int], params: TokenParams) -> None:
        self._now_ns += 1
        self._core.handle(FRONTEND, Add(
            channel_seq=self._now_ns, key=number.to_bytes(16, "big"), stream=number, child=0, attempt=0, attach_no=0,
            resubmitted=False, arrival_ns=self._now_ns, prompt_ids=i32_bytes(prompt), output_ids=b"", params=params, seed=0,
            priority=0, client=b"c", request_hash=b""), self._now_ns)

    def _step(self) -> None:
        self._now_ns += 1
        plan = self._core.schedule(self._now_ns)
        assert plan is not None, "stuck"
        step = self._core.steps[-1]
        streams = [self._streams[self._core.rows.request[row].stream] for row in step.rows.tolist()]
        result = to_core.decode(to_core.encode(self._runner.execute(to_worker.decode(to_worker.encode(plan)))))
        assert isinstance(result, StepResult) and result.status is StepStatus.OK, result
        self._keep(result, streams, step.starts.tolist(), step.num_tokens.tolist(), np.flatnonzero(step.samples).tolist())
        self._core.apply(result, self._now_ns)
        self._core.take_outputs()

    def _keep(self, result: StepResult, streams: list[Continuation], starts: list[int], counts: list[int], sampling: list[int]) -> None:
        self.rows_per_step.append(len(streams))
        for stream, start, count in zip(streams, starts, counts, strict=True):
            if start < len(stream.prompt):
                stream.chunks.append(count)
        assert np.flatnonzero(i32_column(result.num_out)).tolist() == sampling
        for index, (row, token_id) in enumerate(zip(sampling, i32_column(result.token_ids).tolist(), strict=True)):
            streams[row].token_ids.append(token_id)
            streams[row].logits.append(self._model.last[index])
