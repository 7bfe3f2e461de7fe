"""The wire between core and worker: one plan down, one result up.

Owned jointly by ``core_proc`` (writes plans) and ``gpu_worker`` (runs them in
order: admit, grow, run).  Bulk integers are little-endian int32 bytes, read with
``codec.i32_column``.  New fields are appended last; columns of features that do
not exist yet are None, which costs one byte.  ``tests/unit/test_wire.py`` holds
golden bytes.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec
from msgspec import Meta

from protocol.codec import Codec
from protocol.sampling_params import TokenParams

Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Serial = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seed = Annotated[int, Meta(ge=0)]             # 64 bits, all that msgpack holds


class StepStatus(enum.IntEnum):
    """What became of a step."""

    OK = 0
    SKIPPED = 1          # an earlier step failed and no plan with restart_after has come yet
    FAILED_MEMORY = 2
    FAILED_INTERNAL = 3
    FAILED_BAD_PLAN = 4  # the plan contradicts the worker's own bounds: a bug of the core


class RowError(enum.IntEnum):
    """Why one row of a step gave no token; the others are not disturbed."""

    NAN_LOGITS = 1
    EMPTY_MASK = 2       # no token is allowed


class Hello(msgspec.Struct, tag=1, frozen=True, array_like=True, gc=False):
    """First message in both directions.  A worker that meets a new ``epoch`` forgets its rows."""

    protocol_version: int
    role: str
    routing_id: bytes
    epoch: Serial


class Admission(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Everything that row ``req_idx`` must know; it inherits nothing from its predecessor."""

    req_idx: Count
    token_ids: bytes                 # i32[num_known]: prompt, then output so far
    prompt_len: Count                # tokens; the rest of token_ids is output
    num_computed: Count              # tokens whose K/V already stands in block_ids
    block_ids: bytes                 # i32[n]
    params: TokenParams
    seed: Seed
    lora_id: int | None = None
    grammar_id: int | None = None


class StepPlan(msgspec.Struct, tag=2, frozen=True, array_like=True, gc=False):
    """One step.  Rows: decodes first, then prefill chunks; a row samples if and only if
    its computed tokens reach its known tokens."""

    epoch: Serial
    gen: Serial
    step_id: Serial
    restart_after: Serial | None     # step that failed: forget all rows, the admissions follow
    admit: list[Admission]
    grow: bytes                      # i32[k, 2] (req_idx, block_id), appended in order
    rows: bytes                      # i32[R] req_idx
    num_computed: bytes              # i32[R] tokens computed before this step
    num_tokens: bytes                # i32[R] tokens of this step, drafts counted
    num_drafts: bytes | None = None  # i32[R]
    drafts: bytes | None = None      # i32 flat
    num_steps: int = 1
    copies: bytes | None = None      # i32[m, 4] (kind, src, dst, fence)
    control: list[tuple[int, bytes]] | None = None


class WorkerReady(msgspec.Struct, tag=3, frozen=True, array_like=True, gc=False):
    """The worker's answer to Hello: what it can hold and what its numbers are."""

    epoch: Serial
    gen: Serial
    numerics_fingerprint: str
    num_blocks: Count
    max_num_seqs: Count
    vocab_size: Count
    eos_token_ids: bytes             # i32[n]: config and generation_config of the model
    capabilities: list[str]
    max_model_len: Count             # tokens
    bit_exact: bool = False          # the self-check found the arithmetic row-invariant


class Fences(msgspec.Struct, tag=4, frozen=True, array_like=True, gc=False):
    """Copies that ended while no plan was there to carry the news."""

    epoch: Serial
    gen: Serial
    fences_done: bytes               # i32[n]


class LogprobRows(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Raw logprobs of the sampled tokens, one row per token of ``StepResult.token_ids``.

    Column 0 is the sampled token, columns 1… the best ``width - 1`` tokens, ties by lowest
    id.  A row that asked for fewer is filled with id -1.
    """

    width: Count
    ids: bytes                       # i32[n, width]
    values: bytes                    # f32[n, width]
    ranks: bytes | None = None       # i32[n] rank of the sampled token, 1 is the best


class PromptLogprobRows(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Logprobs of known tokens: for each listed row, positions start … start + count - 1,
    each the logprob of the token at that position given those before it."""

    batch_idx: bytes                 # i32[p]
    start: bytes                     # i32[p] absolute position, at least 1
    count: bytes                     # i32[p]
    width: Count
    ids: bytes                       # i32[sum(count), width]; column 0 is the token itself
    values: bytes                    # f32[sum(count), width]
    ranks: bytes | None = None       # i32[sum(count)]


class StepResult(msgspec.Struct, tag=5, frozen=True, array_like=True, gc=False):
    """Positional: row r of the result is row r of the plan."""

    epoch: Serial
    gen: Serial
    step_id: Serial
    status: StepStatus
    num_out: bytes = b""             # i32[R]: 0 … 1 + accepted drafts, or num_steps
    token_ids: bytes = b""           # i32[sum(num_out)]
    row_errors: bytes | None = None  # i32[e, 2] (batch_idx, RowError)
    logprobs: LogprobRows | None = None
    prompt_logprobs: PromptLogprobRows | None = None
    fences_done: bytes | None = None # i32[n]
    timings_us: bytes | None = None  # i32[4] build, forward, sample, total
    detail: str | None = None        # of a failed step, for the log


to_worker = Codec(Hello, StepPlan)
to_core = Codec(Hello, WorkerReady, Fences, StepResult)
