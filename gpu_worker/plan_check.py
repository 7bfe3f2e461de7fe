"""A plan's bytes as columns, checked against the worker's own tables before anything acts on it.

Called by the model runner first thing in each step.  A plan that contradicts the tables is a
bug of the core; it must end as a ``BadPlan`` naming the contradiction, never as a write
outside of memory or as one request reading another's K/V.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpu_worker.request_states import RequestStates, TokenLists
from protocol.codec import BLOCK_SIZE_TOKENS, ColumnError, i32_column
from protocol.steps import Admission, StepPlan


class BadPlan(ValueError):
    """What contradicts what."""


@dataclass(frozen=True, slots=True)
class PlanColumns:
    """A checked plan."""

    admissions: list[tuple[Admission, TokenLists]]
    grow_req_idx: np.ndarray    # int64 [k]
    grow_block_ids: np.ndarray  # int64 [k]
    req_idx: np.ndarray         # int64 [num_rows]
    num_computed: np.ndarray    # int64 [num_rows]
    num_tokens: np.ndarray      # int64 [num_rows] in each of num_steps, drafts counted
    num_steps: int
    num_drafts: np.ndarray      # int64 [num_rows]
    drafts: np.ndarray          # int64 [sum(num_drafts)] row after row


@dataclass(slots=True)
class _Counts:
    """What the tables will say after the plan's admissions and growth."""

    num_tokens: np.ndarray
    num_computed: np.ndarray
    num_row_blocks: np.ndarray


def check_plan(plan: StepPlan, states: RequestStates) -> PlanColumns:
    """The plan's columns; BadPlan if it does not fit the tables, which are not touched."""
    _refuse_unknown_features(plan)
    try:
        grow = i32_column(plan.grow, name="grow").astype(np.int64)
        req_idx = i32_column(plan.rows, name="rows").astype(np.int64)
        num_computed = i32_column(plan.num_computed, len(req_idx), "num_computed").astype(np.int64)
        num_tokens = i32_column(plan.num_tokens, len(req_idx), "num_tokens").astype(np.int64)
        num_drafts, drafts = _drafts(plan, len(req_idx))
        counts = _counts(states, forget=plan.restart_after is not None)
        admissions = [(admission, _check_admission(admission, states, counts)) for admission in plan.admit]
    except ColumnError as error:
        raise BadPlan(str(error)) from None
    admitted = [admission.req_idx for admission in plan.admit]
    _require(len(set(admitted)) == len(admitted), "admit: a row is named twice")
    _require(len(grow) % 2 == 0, "grow: not pairs of (req_idx, block_id)")
    grow = grow.reshape(-1, 2)
    _check_growth(grow, states, counts)
    columns = PlanColumns(admissions, grow[:, 0], grow[:, 1], req_idx, num_computed, num_tokens, plan.num_steps, num_drafts, drafts)
    _check_rows(columns, states, counts)
    return columns


def _counts(states: RequestStates, *, forget: bool) -> _Counts:
    known = np.zeros_like(states.num_tokens) if forget else states.num_tokens.copy()
    return _Counts(known, states.num_computed.copy(), states.num_row_blocks.copy())


def _refuse_unknown_features(plan: StepPlan) -> None:
    _require(not plan.copies, "copies: this worker copies no blocks")
    _require(not plan.control, "control: this worker knows no control messages")


def _drafts(plan: StepPlan, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    drafts = i32_column(plan.drafts, name="drafts").astype(np.int64)
    if plan.num_drafts is None:
        _require(not len(drafts), "drafts: without num_drafts")
        return np.zeros(num_rows, np.int64), drafts
    num_drafts = i32_column(plan.num_drafts, num_rows, "num_drafts").astype(np.int64)
    _require(bool((num_drafts >= 0).all()) and int(num_drafts.sum()) == len(drafts), "drafts: other ones than num_drafts says")
    return num_drafts, drafts


def _check_admission(admission: Admission, states: RequestStates, counts: _Counts) -> TokenLists:
    row, name = admission.req_idx, f"admit row {admission.req_idx}"
    _require(row < states.max_num_seqs, f"{name}: there are {states.max_num_seqs} rows")
    _require(admission.lora_id is None and admission.grammar_id is None, f"{name}: this worker has no LoRA and no grammars")
    token_ids = i32_column(admission.token_ids, name=f"{name}: token_ids")
    block_ids = i32_column(admission.block_ids, name=f"{name}: block_ids")
    _require(_within(token_ids, states.vocab_size), f"{name}: a token id is not in [0, {states.vocab_size})")
    _require(_within(block_ids, states.num_blocks), f"{name}: a block id is not in [0, {states.num_blocks})")
    known = len(token_ids)
    _require(1 <= admission.prompt_len <= known <= states.max_model_len,
             f"{name}: prompt_len {admission.prompt_len} of {known} tokens, max_model_len {states.max_model_len}")
    _require(admission.num_computed < known, f"{name}: num_computed {admission.num_computed} of {known} tokens")
    _require(len(block_ids) <= states.max_blocks, f"{name}: {len(block_ids)} blocks, at most {states.max_blocks}")
    _require(admission.num_computed <= len(block_ids) * BLOCK_SIZE_TOKENS,
             f"{name}: num_computed {admission.num_computed} in {len(block_ids)} blocks")
    _require(admission.seed < 2**64, f"{name}: seed of more than 64 bits")
    counts.num_tokens[row], counts.num_computed[row] = known, admission.num_computed
    counts.num_row_blocks[row] = len(block_ids)
    return _check_lists(admission, states, name)


def _check_lists(admission: Admission, states: RequestStates, name: str) -> TokenLists:
    params = admission.params
    for column in ("allowed_token_ids", "logit_bias_ids", "stop_token_ids", "eos_token_ids", "bad_words_ids"):
        _require(_within(i32_column(getattr(params, column), name=f"{name}: {column}"), states.vocab_size),
                 f"{name}: {column} name a token id not in [0, {states.vocab_size})")
    lengths = i32_column(params.bad_words_lengths, name=f"{name}: bad_words")
    _require(not len(lengths) or int(lengths.min()) >= 1, f"{name}: a bad word without tokens")
    return TokenLists.of(params)


def _check_growth(grow: np.ndarray, states: RequestStates, counts: _Counts) -> None:
    if not len(grow):
        return
    rows, block_ids = grow[:, 0], grow[:, 1]
    _require(_within(rows, states.max_num_seqs) and bool(counts.num_tokens[rows].all()), "grow: a row that nobody is admitted to")
    _require(_within(block_ids, states.num_blocks), f"grow: a block id is not in [0, {states.num_blocks})")
    np.add.at(counts.num_row_blocks, rows, 1)
    _require(int(counts.num_row_blocks[rows].max()) <= states.max_blocks, f"grow: a row of more than {states.max_blocks} blocks")


def _check_rows(columns: PlanColumns, states: RequestStates, counts: _Counts) -> None:
    req_idx, num_computed, num_tokens, num_steps = columns.req_idx, columns.num_computed, columns.num_tokens, columns.num_steps
    _require(1 <= num_steps <= states.max_model_len, f"num_steps: {num_steps}")
    if not len(req_idx):
        return
    _require(_within(req_idx, states.max_num_seqs), f"rows: a row is not in [0, {states.max_num_seqs})")
    _require(int(np.bincount(req_idx).max()) == 1, "rows: a row is named twice")
    known = counts.num_tokens[req_idx]
    _require(bool(known.all()), "rows: a row that nobody is admitted to")
    _require(bool((num_computed == counts.num_computed[req_idx]).all()), "num_computed: differs from the worker's own")
    _require(int(num_tokens.min()) >= 1, "num_tokens: below 1")
    end = num_computed + num_tokens
    _require(bool((end - columns.num_drafts <= known).all()), "num_tokens: more than the row's known tokens")
    ahead = columns.num_drafts + num_steps > 1
    _require(bool(((num_tokens - columns.num_drafts == 1) & (end - columns.num_drafts == known))[ahead].all()),
             "num_steps, drafts: of a row that does not decode")
    _require(num_steps == 1 or not len(columns.drafts), "drafts: in a plan of several steps")
    _require(_within(columns.drafts, states.vocab_size), f"drafts: a token id is not in [0, {states.vocab_size})")
    end = end + num_steps - 1
    _require(bool((end <= counts.num_row_blocks[req_idx] * BLOCK_SIZE_TOKENS).all()), "num_tokens: beyond the row's blocks")
    _require(bool((end < states.max_model_len).all()), "rows: a row would sample beyond max_model_len")


def _within(values: np.ndarray, end: int) -> bool:
    """All in [0, end): one comparison, for a negative value is a large unsigned one."""
    return not len(values) or int(values.astype(np.int64).view(np.uint64).max()) < end


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise BadPlan(message)
