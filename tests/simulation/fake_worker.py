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
        return next_token(self.prefixes[-1], self.seed, len(self.tokens) - self.prompt_len)


Entry = tuple[Row, int, int, list[int]]      # row, tokens computed before, known tokens of this step, drafts behind them


class Output:
    """What the rows of a plan gave, row by row."""

    def __init__(self, num_rows: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self.logprobs: list[list[LogprobRow | None]] = [[] for _ in range(num_rows)]
        self.errors: dict[int, RowError] = {}
        self.prompt_logprobs: PromptLogprobRows | None = None

    def result(self, plan: StepPlan, timings_us: bytes | None) -> StepResult:
        return StepResult(
            plan.epoch, plan.gen, plan.step_id, StepStatus.OK, i32_bytes([len(own) for own in self.tokens]),
            i32_bytes([token for own in self.tokens for token in own]),
            row_errors=i32_bytes([v for pair in self.errors.items() for v in pair]) if self.errors else None,
            logprobs=_logprob_rows([row for own in self.logprobs for row in own]), prompt_logprobs=self.prompt_logprobs,
            timings_us=timings_us)


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
        entries = self._checked(plan)
        status = self.faults.of_step([self._to_run(entry, plan.num_steps) for entry in entries])
        if status is not StepStatus.OK:
            return self._fail(plan, entries, status)
        output = Output(len(entries))
        for _ in range(plan.num_steps):
            self._store(entries)
            self._attend_and_sample(entries, output)
            output.prompt_logprobs = output.prompt_logprobs or _prompt_logprob_rows(entries)
            entries = [(row, row.num_computed, 1, []) for row, *_ in entries]
        return output.result(plan, self._timings(plan))

    # --- before ---

    def _admit(self, admission: Admission) -> None:
        blocks, tokens = i32_column(admission.block_ids).tolist(), i32_column(admission.token_ids).tolist()
        self._demand(0 <= admission.req_idx < self.max_num_seqs, "a row that exists")
        self._demand(all(0 <= block_id < len(self.memory) for block_id in blocks), "blocks that exist")
        self._demand(len(set(blocks)) == len(blocks), "no block twice")
        self._demand(admission.num_computed < len(tokens), "something to compute")
        self._demand(admission.num_computed <= len(blocks) * self.block_size, "blocks for what is computed")
        self.rows[admission.req_idx] = Row(
            tokens, admission.prompt_len, admission.num_computed, blocks, admission.seed, admission.params)
        whole, part = divmod(admission.num_computed, self.block_size)
        if part:
            self.memory[blocks[whole]][part:] = [GARBAGE] * (self.block_size - part)
        self._spoil(blocks[whole + bool(part):])

    def _spoil(self, blocks: list[int]) -> None:
        for block_id in blocks:
            self.memory[block_id] = [GARBAGE] * self.block_size

    def _checked(self, plan: StepPlan) -> list[Entry]:
        rows, starts, counts = (i32_column(column).tolist() for column in (plan.rows, plan.num_computed, plan.num_tokens))
        drafts = self._drafts(plan, len(rows))
        self._demand(len(set(rows)) == len(rows) == len(starts) == len(counts), "no row twice")
        self._demand(bool(rows), "a plan with work in it")
        entries, chunk_seen = [], False
        for req_idx, start, count, own in zip(rows, starts, counts, drafts, strict=True):
            self._demand(req_idx in self.rows, "a row that was admitted")
            row = self.rows[req_idx]
            self._demand(start == row.num_computed, f"num_computed {start}, the worker has {row.num_computed}")
            self._demand(start + count + plan.num_steps - 1 <= len(row.blocks) * self.block_size, "blocks for all of them")
            count -= len(own)
            decodes = count == 1 and start + count == len(row.tokens)
            self._demand(decodes or (plan.num_steps == 1 and not own), "drafts and several steps for decodes only")
            self._demand(0 < count and start + count <= len(row.tokens), "tokens that are known")
            self._demand(not (chunk_seen and count == 1), "decodes before chunks")
            chunk_seen |= count > 1
            entries.append((row, start, count, own))
        return entries

    def _drafts(self, plan: StepPlan, num_rows: int) -> list[list[int]]:
        if plan.num_drafts is None:
            self._demand(plan.drafts is None, "no drafts without their number")
            return [[]] * num_rows
        self._demand(plan.num_steps == 1, "drafts in a plan of one step")
        counts, flat = i32_column(plan.num_drafts, num_rows).tolist(), i32_column(plan.drafts).tolist()
        self._demand(sum(counts) == len(flat) > 0 and min(counts) >= 0, "as many drafts as is said")
        return [flat[sum(counts[:at]):sum(counts[:at + 1])] for at in range(num_rows)]

    def _to_run(self, entry: Entry, num_steps: int) -> RowToRun:
        row, start, count, drafts = entry
        return RowToRun(row.seed, count + len(drafts), start + count + num_steps - 1 - row.prompt_len)

    # --- the step ---

    def _fail(self, plan: StepPlan, entries: list[Entry], status: StepStatus) -> StepResult:
        """Nobody may count on what it would have written."""
        stage = self.faults.stage()
        if stage is not Stage.ADMITTED:
            self._store(entries)
        if stage is Stage.STORING:
            for row, start, count, drafts in entries:
                self._spoil_part(row, start, count + len(drafts) + plan.num_steps - 1)
        self.failed_step = plan.step_id
        return StepResult(plan.epoch, plan.gen, plan.step_id, status, detail="simulated")

    def _spoil_part(self, row: Row, start: int, count: int) -> None:
        for position in range(start, start + count):
            if self.faults.rng.random() < 0.6:
                self.memory[row.blocks[position // self.block_size]][position % self.block_size] = GARBAGE

    def _store(self, entries: list[Entry]) -> None:
        size = self.block_size
        for row, start, count, drafts in entries:
            prefixes = _with_drafts(row, start + count, drafts)
            for position in range(start, start + count + len(drafts)):
                self.memory[row.blocks[position // size]][position % size] = prefixes[position]

    def _attend_and_sample(self, entries: list[Entry], output: Output) -> None:
        for batch_idx, (row, start, count, drafts) in enumerate(entries):
            self._attend(row, start + count, drafts)
            row.num_computed = start + count
            self._sample(batch_idx, row, count, output)
            for draft in drafts:
                if row.tokens[-1] != draft or row.is_bad:
                    break
                row.num_computed += 1
                self._sample(batch_idx, row, 1, output)

    def _sample(self, batch_idx: int, row: Row, count: int, output: Output) -> None:
        """One token, if all of its tokens are computed; ``count`` of them in this step."""
        computed, known = row.num_computed, len(row.tokens)
        fails = row.is_bad or self.faults.of_row(RowToRun(row.seed, count, computed - row.prompt_len))
        if fails:
            output.errors.setdefault(batch_idx, RowError.NAN_LOGITS)
            row.is_bad = True
            self._spoil_part(row, computed - count, count)
        if computed < known:
            return
        token = row.tokens[-1] if fails else row.sample()    # a filler keeps the row's length for the next plan
        if not fails:
            asked = row.params.logprobs
            output.tokens[batch_idx].append(token)
            output.logprobs[batch_idx].append(None if asked is None else logprob_row(row.prefixes[-1], token, asked))
        row.tokens.append(token)
        row.learn()

    def _attend(self, row: Row, end: int, drafts: list[int]) -> None:
        """Every position before ``end``, and the drafts behind it, hold this row's own prefix."""
        size, prefixes = self.block_size, _with_drafts(row, end, drafts)
        end += len(drafts)
        for at in range(0, end, size):
            found = self.memory[row.blocks[at // size]][:end - at]
            expected = prefixes[at:min(at + size, end)]
            self._demand(found == expected or row.is_bad, f"foreign K/V in positions {at} … {at + len(expected) - 1}")

    def _timings(self, plan: StepPlan) -> bytes | None:
        """By and large in proportion to the tokens; now and then far from it."""
        if not self.faults.world.token_us:
            return None
        noise = self.faults.rng.choice([0.5, 0.9, 1.0, 1.0, 1.1, 8.0])
        return i32_bytes([0, 0, 0, int(noise * self.faults.world.token_us * plan.num_steps * int(i32_column(plan.num_tokens).sum()))])

    def _demand(self, holds: bool, what: str) -> None:
        if not holds:
            raise WorkerComplaint(what)


def _with_drafts(row: Row, end: int, drafts: list[int]) -> list[int]:
    """Identities up to ``end``, and those of the drafts behind it."""
    prefixes = row.prefixes[:end]
    for token in drafts:
        prefixes.append(extend(prefixes[-1], token))
    return prefixes


def _logprob_rows(rows: list[LogprobRow | None]) -> LogprobRows | None:
    """As wide as the widest; a row that nobody asked for is filled with id -1."""
    width = max((len(row[0]) for row in rows if row is not None), default=0)
    return LogprobRows(width, *_columns([row or ([], [], 0) for row in rows], width)) if width else None


def _prompt_logprob_rows(entries: list[Entry]) -> PromptLogprobRows | None:
    """Of the prompt tokens that follow this step's tokens."""
    parts, rows = [], []
    for batch_idx, (row, start, count, _) in enumerate(entries):
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
