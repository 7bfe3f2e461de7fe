"""A worker without a model: shadow KV memory that knows whose content stands where.

Each position of each block holds the identity of the prefix that was written there.  Before
a row attends, every position that it looks at must hold the identity of its own prefix.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from protocol.codec import i32_bytes, i32_column
from protocol.steps import Admission, RowError, StepPlan, StepResult, StepStatus
from simulation.reference import ROOT, extend, next_token

GARBAGE = -1                 # what a failed step leaves behind


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
    stop_ids: frozenset[int]
    min_tokens: int
    prefixes: list[int] = field(default_factory=list)    # identity of tokens[: i + 1]

    def learn(self) -> None:
        """Identities of tokens that have none yet."""
        while len(self.prefixes) < len(self.tokens):
            before = self.prefixes[-1] if self.prefixes else ROOT
            self.prefixes.append(extend(before, self.tokens[len(self.prefixes)]))

    def sample(self) -> int:
        return next_token(self.prefixes[-1], self.seed, len(self.tokens) - self.prompt_len, self.stop_ids, self.min_tokens)


class FakeWorker:
    """Runs plans in order: admit, grow, store all, attend, sample."""

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int, rng: random.Random, fail_rate: float, row_error_rate: float) -> None:
        self.block_size, self.max_num_seqs = block_size, max_num_seqs
        self.memory = [[0] * block_size for _ in range(num_blocks)]
        self.rows: dict[int, Row] = {}
        self.rng, self.fail_rate, self.row_error_rate = rng, fail_rate, row_error_rate
        self.failed_step: int | None = None
        self.last_step = 0

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
        for admission in plan.admit:
            self._admit(admission)
        for req_idx, block_id in i32_column(plan.grow).reshape(-1, 2).tolist():
            self.rows[req_idx].blocks.append(block_id)
        entries = list(zip(*(i32_column(column).tolist() for column in (plan.rows, plan.num_computed, plan.num_tokens)), strict=True))
        self._check(entries)
        if self.rng.random() < self.fail_rate:
            return self._fail(plan, entries)
        self._store(entries)
        return self._attend_and_sample(plan, entries)

    def _admit(self, admission: Admission) -> None:
        blocks, tokens = i32_column(admission.block_ids).tolist(), i32_column(admission.token_ids).tolist()
        self._demand(0 <= admission.req_idx < self.max_num_seqs, "a row that exists")
        self._demand(all(0 <= block_id < len(self.memory) for block_id in blocks), "blocks that exist")
        self._demand(len(set(blocks)) == len(blocks), "no block twice")
        row = Row(tokens, admission.prompt_len, admission.num_computed, blocks, admission.seed,
                  frozenset(i32_column(admission.params.stop_token_ids).tolist()), admission.params.min_tokens)
        row.learn()
        self.rows[admission.req_idx] = row

    def _check(self, entries: list[tuple[int, int, int]]) -> None:
        self._demand(len({req_idx for req_idx, _, _ in entries}) == len(entries), "no row twice")
        chunk_seen = False
        for req_idx, start, count in entries:
            self._demand(req_idx in self.rows, "a row that was admitted")
            row = self.rows[req_idx]
            self._demand(start == row.num_computed, f"num_computed {start}, the worker has {row.num_computed}")
            self._demand(0 < count and start + count <= len(row.tokens), "tokens that are known")
            self._demand(start + count <= len(row.blocks) * self.block_size, "blocks for all of them")
            self._demand(not (chunk_seen and count == 1), "decodes before chunks")
            chunk_seen |= count > 1

    def _fail(self, plan: StepPlan, entries: list[tuple[int, int, int]]) -> StepResult:
        """Some of what it would have written is spoilt."""
        for req_idx, start, count in entries:
            row = self.rows[req_idx]
            for position in range(start, start + count):
                if self.rng.random() < 0.7:
                    self.memory[row.blocks[position // self.block_size]][position % self.block_size] = GARBAGE
        self.failed_step = plan.step_id
        status = self.rng.choice([StepStatus.FAILED_MEMORY, StepStatus.FAILED_INTERNAL])
        return StepResult(plan.epoch, plan.gen, plan.step_id, status, detail="simulated")

    def _store(self, entries: list[tuple[int, int, int]]) -> None:
        for req_idx, start, count in entries:
            row = self.rows[req_idx]
            for position in range(start, start + count):
                self.memory[row.blocks[position // self.block_size]][position % self.block_size] = row.prefixes[position]

    def _attend_and_sample(self, plan: StepPlan, entries: list[tuple[int, int, int]]) -> StepResult:
        num_out, tokens, errors = [], [], []
        for batch_idx, (req_idx, start, count) in enumerate(entries):
            row = self.rows[req_idx]
            row.num_computed = end = start + count
            for block in range(-(-end // self.block_size)):
                at = block * self.block_size
                seen = min(end - at, self.block_size)
                self._demand(self.memory[row.blocks[block]][:seen] == row.prefixes[at:at + seen],
                             f"row {req_idx} attends to foreign K/V in positions {at} … {at + seen - 1}")
            samples = end == len(row.tokens)
            failed = samples and self.rng.random() < self.row_error_rate
            if failed:
                errors += [batch_idx, RowError.NAN_LOGITS]
            if samples:
                token = row.tokens[-1] if failed else row.sample()    # a filler keeps the row's length for the next plan
                row.tokens.append(token)
                row.learn()
                if not failed:
                    tokens.append(token)
            num_out.append(int(samples and not failed))
        return StepResult(plan.epoch, plan.gen, plan.step_id, StepStatus.OK, i32_bytes(num_out), i32_bytes(tokens),
                          row_errors=i32_bytes(errors) if errors else None)

    def _demand(self, holds: bool, what: str) -> None:
        if not holds:
            raise WorkerComplaint(what)
