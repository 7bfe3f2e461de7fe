"""A worker without a model: shadow KV memory that knows whose content stands where.

Each position of each block holds the identity of the prefix that was written there.  Before
a row attends, every position that it looks at must hold the identity of its own prefix.
Blocks are spoilt when a row gets them, so nothing that stood there before can pass for new.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from protocol.codec import f32_bytes, i32_bytes, i32_column
from protocol.sampling_params import TokenParams
from protocol.steps import Admission, LogprobRows, PromptLogprobRows, RowError, StepPlan, StepResult, StepStatus
from simulation.faults import Faults, RowToRun, Stage
from simulation.reference import ROOT, LogprobRow, extend, logprob_row, next_token

GARBAGE = None               # what no prefix is known by


class WorkerComplaint(AssertionError):
    """The plan contradicts what the worker holds, or a row would attend to something foreign."""


@dataclass
class Row:
    """The worker's replica of one request."""

    tokens: list[int]
    prompt_len: int
    num_computed: int
    blocks: list[int]
    seed: int
    params: TokenParams
    stop_ids: frozenset[int]
    prefixes: list[int] = field(default_factory=list)    # identity of tokens[: i + 1]
    is_bad: bool = False                                 # it had an error: its own K/V is worth nothing

    def __post_init__(self) -> None:
        self.learn()

    def learn(self) -> None:
        """Identities of tokens that have none yet."""
        while len(self.prefixes) < len(self.tokens):
            before = self.prefixes[-1] if self.prefixes else ROOT
            self.prefixes.append(extend(before, self.tokens[len(self.prefixes)]))

    def sample(self) -> int:
        return next_token(self.prefixes[-1], self.seed, len(self.tokens) - self.prompt_len, self.stop_ids, self.params.min_tokens)


Entry = tuple[Row, int, int]     # row, tokens computed before, tokens of this step


class FakeWorker:
    """Runs plans in order: admit, grow, store all, attend, sample."""

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int, faults: Faults) -> None:
        self.block_size, self.max_num_seqs, self.faults = block_size, max_num_seqs, faults
        self.memory: list[list[int | None]] = [[GARBAGE] * block_size for _ in range(num_blocks)]
        self.rows: dict[int, Row] = {}
        self.failed_step: int | None = None
        self.last_step = 0
        self.num_run = 0             # steps that were not skipped

    def run(self, plan: StepPlan) -> StepResult:
        self._demand(plan.step_id == self.last_step + 1, "steps in order")
        self.last_step = plan.step_id
        if self.failed_step is not None:
            if plan.restart_after != self.failed_step:
                return StepResult(plan.epoch, plan.gen, plan.step_id, StepStatus.SKIPPED)
            self.rows.clear()
            self.failed_step = None
        else:
            self._demand(plan.restart_after is None, "restart only after a failed step")
        self.num_run += 1
        for admission in plan.admit:
            self._admit(admission)
        for req_idx, block_id in i32_column(plan.grow).reshape(-1, 2).tolist():
            self._spoil([block_id])
            self.rows[req_idx].blocks.append(block_id)
        entries = self._checked(*(i32_column(column).tolist() for column in (plan.rows, plan.num_computed, plan.num_tokens)))
        status = self.faults.of_step([self._to_run(entry) for entry in entries])
        if status is not StepStatus.OK:
            return self._fail(plan, entries, status)
        self._store(entries)
        return self._attend_and_sample(plan, entries)

    # --- before ---

    def _admit(self, admission: Admission) -> None:
        blocks, tokens = i32_column(admission.block_ids).tolist(), i32_column(admission.token_ids).tolist()
        self._demand(0 <= admission.req_idx < self.max_num_seqs, "a row that exists")
        self._demand(all(0 <= block_id < len(self.memory) for block_id in blocks), "blocks that exist")
        self._demand(len(set(blocks)) == len(blocks), "no block twice")
        self._demand(admission.num_computed < len(tokens), "something to compute")
        self._demand(admission.num_computed <= len(blocks) * self.block_size, "blocks for what is computed")
        params = admission.params
        ends = i32_column(params.stop_token_ids).tolist() + i32_column(params.eos_token_ids).tolist()
        self.rows[admission.req_idx] = Row(
            tokens, admission.prompt_len, admission.num_computed, blocks, admission.seed, params, frozenset(ends))
        whole, part = divmod(admission.num_computed, self.block_size)
        if part:
            self.memory[blocks[whole]][part:] = [GARBAGE] * (self.block_size - part)
        self._spoil(blocks[whole + bool(part):])

    def _spoil(self, blocks: list[int]) -> None:
        for block_id in blocks:
            self.memory[block_id] = [GARBAGE] * self.block_size

    def _checked(self, rows: list[int], starts: list[int], counts: list[int]) -> list[Entry]:
        self._demand(len(set(rows)) == len(rows) == len(starts) == len(counts), "no row twice")
        self._demand(bool(rows), "a plan with work in it")
        entries, chunk_seen = [], False
        for req_idx, start, count in zip(rows, starts, counts, strict=True):
            self._demand(req_idx in self.rows, "a row that was admitted")
            row = self.rows[req_idx]
            self._demand(start == row.num_computed, f"num_computed {start}, the worker has {row.num_computed}")
            self._demand(0 < count and start + count <= len(row.tokens), "tokens that are known")
            self._demand(start + count <= len(row.blocks) * self.block_size, "blocks for all of them")
            self._demand(not (chunk_seen and count == 1), "decodes before chunks")
            chunk_seen |= count > 1
            entries.append((row, start, count))
        return entries

    def _to_run(self, entry: Entry) -> RowToRun:
        row, start, count = entry
        return RowToRun(row.seed, count, start + count - row.prompt_len)

    # --- the step ---

    def _fail(self, plan: StepPlan, entries: list[Entry], status: StepStatus) -> StepResult:
        """Nobody may count on what it would have written."""
        stage = self.faults.stage()
        if stage is not Stage.ADMITTED:
            self._store(entries)
        if stage is Stage.STORING:
            for row, start, count in entries:
                self._spoil_part(row, start, count)
        self.failed_step = plan.step_id
        return StepResult(plan.epoch, plan.gen, plan.step_id, status, detail="simulated")

    def _spoil_part(self, row: Row, start: int, count: int) -> None:
        for position in range(start, start + count):
            if self.faults.rng.random() < 0.6:
                self.memory[row.blocks[position // self.block_size]][position % self.block_size] = GARBAGE

    def _store(self, entries: list[Entry]) -> None:
        size = self.block_size
        for row, start, count in entries:
            for position in range(start, start + count):
                self.memory[row.blocks[position // size]][position % size] = row.prefixes[position]

    def _attend_and_sample(self, plan: StepPlan, entries: list[Entry]) -> StepResult:
        num_out, tokens, errors = [], [], []
        logprobs: list[LogprobRow | None] = []
        for batch_idx, entry in enumerate(entries):
            row, start, count = entry
            self._attend(row, start + count)
            row.num_computed = start + count
            samples = row.num_computed == len(row.tokens)
            fails = self.faults.of_row(self._to_run(entry))
            if fails:
                errors += [batch_idx, RowError.NAN_LOGITS]
                row.is_bad = True
                self._spoil_part(row, start, count)
            num_out.append(int(samples and not fails))
            if not samples:
                continue
            token = row.tokens[-1] if fails else row.sample()    # a filler keeps the row's length for the next plan
            if not fails:
                asked = row.params.logprobs
                tokens.append(token)
                logprobs.append(None if asked is None else logprob_row(row.prefixes[-1], token, asked))
            row.tokens.append(token)
            row.learn()
        return StepResult(plan.epoch, plan.gen, plan.step_id, StepStatus.OK, i32_bytes(num_out), i32_bytes(tokens),
                          row_errors=i32_bytes(errors) if errors else None, logprobs=_logprob_rows(logprobs),
                          prompt_logprobs=_prompt_logprob_rows(entries))

    def _attend(self, row: Row, end: int) -> None:
        """Every position before ``end`` holds this row's own prefix."""
        size = self.block_size
        for at in range(0, end, size):
            found = self.memory[row.blocks[at // size]][:end - at]
            expected = row.prefixes[at:min(at + size, end)]
            self._demand(found == expected or row.is_bad, f"foreign K/V in positions {at} … {at + len(expected) - 1}")

    def _demand(self, holds: bool, what: str) -> None:
        if not holds:
            raise WorkerComplaint(what)


def _logprob_rows(rows: list[LogprobRow | None]) -> LogprobRows | None:
    """As wide as the widest; a row that nobody asked for is filled with id -1."""
    width = max((len(row[0]) for row in rows if row is not None), default=0)
    return LogprobRows(width, *_columns([row or ([], [], 0) for row in rows], width)) if width else None


def _prompt_logprob_rows(entries: list[Entry]) -> PromptLogprobRows | None:
    """Of the prompt tokens that follow this step's tokens."""
    parts, rows = [], []
    for batch_idx, (row, start, count) in enumerate(entries):
        last = min(start + count, row.prompt_len - 1)
        if row.params.prompt_logprobs is not None and last > start:
            parts.append((batch_idx, start + 1, last - start))
            rows += [logprob_row(row.prefixes[at - 1], row.tokens[at], row.params.prompt_logprobs) for at in range(start + 1, last + 1)]
    if not parts:
        return None
    width = max(len(row[0]) for row in rows)
    return PromptLogprobRows(*(i32_bytes(column) for column in zip(*parts)), width, *_columns(rows, width))


def _columns(rows: list[LogprobRow], width: int) -> tuple[bytes, bytes, bytes]:
    ids, values = np.full((len(rows), width), -1, np.int32), np.zeros((len(rows), width), np.float32)
    for at, (own_ids, own_values, _) in enumerate(rows):
        ids[at, :len(own_ids)], values[at, :len(own_values)] = own_ids, own_values
    return i32_bytes(ids), f32_bytes(values), i32_bytes([rank for _, _, rank in rows])
