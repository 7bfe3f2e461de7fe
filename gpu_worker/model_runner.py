"""Runs plans: the one place where rows, K/V, model and sampler meet; the same for CPU and CUDA.

Owned by ``process.py``, which feeds it plans in order.  A plan is applied as admit, grow, run;
the model stores the K/V of the whole batch before any row attends; a plan of several decode
steps is run as many times over.  A row that fails (NaN, an empty mask) fails alone.  A step that
fails as a whole leaves tables that nobody may trust: every later plan is answered with
``skipped`` until one carries ``restart_after`` = that step, which forgets all rows and admits
them anew.
"""

from __future__ import annotations

import logging
import time

import numpy as np
import torch
from torch import Tensor

from gpu_worker.draft_check import accept
from gpu_worker.input_batch import InputBatch, build_batch, logits_indices
from gpu_worker.kv_cache import KVCache
from gpu_worker.logit_changes import SamplingRows
from gpu_worker.logprobs import joined, logprobs_of
from gpu_worker.models.spec import LoadedModel
from gpu_worker.plan_check import BadPlan, PlanColumns, check_plan
from gpu_worker.request_states import RequestStates
from gpu_worker.row_buckets import RowBuckets
from gpu_worker.sampler import sample
from gpu_worker.step_output import Samples, output_columns
from protocol.codec import f32_bytes, i32_bytes
from protocol.steps import PromptLogprobRows, StepPlan, StepResult, StepStatus

logger = logging.getLogger(__name__)
PROMPT_LOGPROB_ROWS = 64     # logits held at once for prompt_logprobs
DETAIL_CHARS = 500
NO_MEMORY_TEXTS = ("can't allocate memory", "not enough memory", "out of memory")


class ModelRunner:
    """``execute(plan) -> StepResult``; raises only when the accelerator itself is lost."""

    def __init__(self, model: LoadedModel, kv: KVCache, states: RequestStates, buckets: RowBuckets) -> None:
        self.model, self.kv, self.states, self.buckets = model, kv, states, buckets
        self._failed_step: int | None = None

    def execute(self, plan: StepPlan) -> StepResult:
        """The plan's result: ok, failed, or skipped after a failed one."""
        if self._failed_step is not None and plan.restart_after != self._failed_step:
            return StepResult(plan.epoch, plan.gen, plan.step_id, StepStatus.SKIPPED)
        self._failed_step = None
        try:
            return self._run(plan)
        except torch.AcceleratorError:   # every later call would fail too, and innocent requests be blamed
            raise
        except Exception as error:  # whatever else a step does, the core must hear of it
            self._failed_step = plan.step_id
            status = _status_of(error)
            logger.error("step %d failed (%s)", plan.step_id, status.name, exc_info=error)
            detail = f"{type(error).__name__}: {error}"[:DETAIL_CHARS]
            return StepResult(plan.epoch, plan.gen, plan.step_id, status, detail=detail)

    def reset(self) -> None:
        """A new core: no row belongs to anybody, no failed step is remembered."""
        self.states.forget_all()
        self._failed_step = None

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> StepResult:
        started = time.perf_counter()
        columns = check_plan(plan, self.states)
        self._apply(plan, columns)
        if not len(columns.req_idx):
            return StepResult(plan.epoch, plan.gen, plan.step_id, StepStatus.OK)
        times_s, rounds, prompt_logprobs = np.zeros(3), [], None
        for _ in range(columns.num_steps):
            began = time.perf_counter()
            batch = build_batch(columns.req_idx, columns.num_tokens, columns.num_drafts, self.states, self.buckets)
            built = time.perf_counter()
            hidden = self.model.forward(batch.token_ids, batch.positions, batch.attention, self.kv)
            forwarded = time.perf_counter()
            prompt_logprobs = prompt_logprobs or self._prompt_logprobs(batch, hidden)
            rounds.append(self._sample(batch, hidden))
            times_s += (built - began, forwarded - built, time.perf_counter() - forwarded)
        output = output_columns(rounds, len(columns.req_idx))
        total_s = time.perf_counter() - started
        return StepResult(
            plan.epoch, plan.gen, plan.step_id, StepStatus.OK, prompt_logprobs=prompt_logprobs,
            timings_us=i32_bytes([int(t * 1e6) for t in (*times_s, total_s)]), **output)

    def _apply(self, plan: StepPlan, columns: PlanColumns) -> None:
        if plan.restart_after is not None:
            self.states.forget_all()
        for admission, lists in columns.admissions:
            self.states.admit(admission, lists)
        self.states.grow(columns.grow_req_idx, columns.grow_block_ids)
        if len(columns.drafts):
            self.states.write_drafts(columns.req_idx, columns.num_drafts, columns.drafts)

    def _sample(self, batch: InputBatch, hidden: Tensor) -> Samples:
        """Of the rows that sample; the tables now hold this step's K/V and tokens."""
        if not len(batch.sampling):
            self.states.advance(batch.req_idx, batch.num_new)
            nothing = torch.zeros(0, dtype=torch.int64, device=hidden.device)
            return Samples(batch.sampling, nothing, nothing, batch.sampling, None)
        logits = self.model.compute_logits(hidden.index_select(0, batch.logits_indices))
        rows = self._sampling_rows(batch)
        sampled = sample(logits, rows, self.model.picker)
        if batch.num_drafts.any():
            counts, token_ids = accept(sampled, batch, self.states)
            kept = torch.from_numpy(np.flatnonzero(counts)).to(logits.device)
            return _samples(logits[kept], batch.sampling[counts], token_ids[kept], sampled.errors[kept], rows.params["logprobs"][counts])
        appended = self.states.append(rows.req_idx, sampled.token_ids, sampled.errors != 0)
        self.states.advance(batch.req_idx, batch.num_new)
        return _samples(logits, batch.sampling, appended, sampled.errors, rows.params["logprobs"])

    def _sampling_rows(self, batch: InputBatch) -> SamplingRows:
        states, req_idx = self.states, batch.req_idx[batch.sampling]
        return SamplingRows(req_idx, states.num_tokens[req_idx] + batch.sample_number, states.prompt_len[req_idx], states.params[req_idx],
                            [states.lists[row] for row in req_idx.tolist()], states.token_ids)

    def _prompt_logprobs(self, batch: InputBatch, hidden: Tensor) -> PromptLogprobRows | None:
        """Of the prompt tokens that follow this step's tokens, in slices of 64 rows of logits."""
        states, num_best = self.states, self.states.params["prompt_logprobs"][batch.req_idx]
        last = np.minimum(batch.num_computed + batch.num_new, states.prompt_len[batch.req_idx] - 1)
        count = np.where(num_best >= 0, np.maximum(last - batch.num_computed, 0), 0)
        asked = np.flatnonzero(count)
        if not len(asked):
            return None
        row = np.repeat(asked, count[asked])
        offset = np.arange(len(row)) - np.repeat(np.cumsum(count[asked]) - count[asked], count[asked])
        following = states.max_model_len * batch.req_idx[row] + batch.num_computed[row] + offset + 1
        most, parts = int(num_best[asked].max()), []
        for begin in range(0, len(row), PROMPT_LOGPROB_ROWS):
            part = slice(begin, begin + PROMPT_LOGPROB_ROWS)
            tokens = logits_indices(batch.first_token[row[part]] + offset[part], self.buckets, hidden.device)
            logits = self.model.compute_logits(hidden.index_select(0, tokens))
            given = states.token_ids.view(-1)[torch.from_numpy(following[part]).to(hidden.device)].long()
            parts.append(logprobs_of(logits[:len(given)], given, num_best[row[part]], most))
        found = joined(parts)
        return PromptLogprobRows(
            i32_bytes(asked), i32_bytes(batch.num_computed[asked] + 1), i32_bytes(count[asked]), found.ids.shape[1],
            i32_bytes(found.ids), f32_bytes(found.values), i32_bytes(found.ranks))


def _samples(logits: Tensor, batch_idx: np.ndarray, token_ids: Tensor, errors: Tensor, num_best: np.ndarray) -> Samples:
    """With the logprobs that were asked for; ``logits`` [at least n, vocab_size]."""
    asked, logprobs = np.flatnonzero(num_best >= 0), None
    if len(asked):
        place = torch.from_numpy(asked).to(logits.device)
        logprobs = logprobs_of(logits[place], token_ids[place], num_best[asked], int(num_best[asked].max()))
    return Samples(batch_idx, token_ids, errors, asked, logprobs)


def _status_of(error: Exception) -> StepStatus:
    if isinstance(error, BadPlan):
        return StepStatus.FAILED_BAD_PLAN
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return StepStatus.FAILED_MEMORY
    if isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY_TEXTS):
        return StepStatus.FAILED_MEMORY       # the CPU allocator raises a plain RuntimeError
    return StepStatus.FAILED_INTERNAL
