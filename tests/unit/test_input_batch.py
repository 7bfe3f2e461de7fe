"""From plans to tensors: new, cached and mixed requests, padding, and the refusal of bad plans."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch

from gpu_worker.input_batch import InputBatch, build_batch
from gpu_worker.plan_check import BadPlan, check_plan
from gpu_worker.request_states import RequestStates
from gpu_worker.row_buckets import RowBuckets
from protocol.codec import i32_bytes
from protocol.sampling_params import TokenParams
from protocol.steps import Admission, StepPlan

ROWS, MAX_LEN, VOCAB, BLOCKS = 6, 160, 100, 40
CPU = torch.device("cpu")
GREEDY = TokenParams(max_tokens=8, temperature=0.0)


@pytest.fixture
def states() -> RequestStates:
    return RequestStates(ROWS, MAX_LEN, VOCAB, BLOCKS, CPU)


def admission(row: int, token_ids: list[int], block_ids: list[int], num_computed: int = 0, **fields: object) -> Admission:
    columns = {"prompt_len": len(token_ids), "params": GREEDY, "seed": 1} | fields
    return Admission(req_idx=row, token_ids=i32_bytes(token_ids), block_ids=i32_bytes(block_ids), num_computed=num_computed, **columns)


def plan(admit: list[Admission], rows: list[tuple[int, int, int]], grow: list[tuple[int, int]] = (), **fields: object) -> StepPlan:
    """``rows``: (req_idx, num_computed, num_tokens)."""
    columns = [i32_bytes([row[i] for row in rows]) for i in range(3)]
    whole = StepPlan(1, 1, 0, None, admit, i32_bytes([value for pair in grow for value in pair]), *columns)
    return msgspec.structs.replace(whole, **fields)


def batch_of(states: RequestStates, step: StepPlan, buckets: RowBuckets = RowBuckets()) -> InputBatch:
    """What the runner does before a forward."""
    columns = check_plan(step, states)
    for admitted, lists in columns.admissions:
        states.admit(admitted, lists)
    states.grow(columns.grow_req_idx, columns.grow_block_ids)
    if len(columns.drafts):
        states.write_drafts(columns.req_idx, columns.num_drafts, columns.drafts)
    return build_batch(columns.req_idx, columns.num_tokens, columns.num_drafts, states, buckets)


def run_rows(states: RequestStates, batch: InputBatch, token: int) -> None:
    """What the runner does after a forward, where every row that samples gets ``token``."""
    req_idx = batch.req_idx[batch.sampling]
    states.append(req_idx, torch.full((len(req_idx),), token), torch.zeros(len(req_idx), dtype=torch.bool))
    states.advance(batch.req_idx, batch.num_new)


def test_create_batch(states: RequestStates) -> None:
    batch = batch_of(states, plan([admission(2, [7, 8, 9], [4])], [(2, 0, 3)]))
    assert batch.req_idx.tolist() == [2] and batch.num_new.tolist() == [3] and batch.num_computed.tolist() == [0]
    assert batch.num_tokens == 3 and batch.sampling.tolist() == [0]


def test_batch_to_tensors(states: RequestStates) -> None:
    """Every tensor of a batch of two rows, with its dtype; 37 tokens are padded to 40, 2 rows of logits to 4."""
    first, second = list(range(10, 45)), [3, 4]
    batch = batch_of(states, plan([admission(0, first, [5, 9]), admission(3, second, [1])], [(0, 0, 35), (3, 0, 2)]))
    positions = [*range(35), 0, 1]
    slots = [5 * 32 + i for i in range(32)] + [9 * 32 + i for i in range(3)] + [32, 33]
    expected = {
        "token_ids": (batch.token_ids, first + second + [0] * 3, torch.int64),
        "positions": (batch.positions, positions + [0] * 3, torch.int64),
        "logits_indices": (batch.logits_indices, [34, 36, 0, 0], torch.int64),
        "query_start_loc": (batch.attention.query_start_loc, [0, 35, 37], torch.int32),
        "seq_lens": (batch.attention.seq_lens, [35, 2], torch.int32),
        "slot_mapping": (batch.attention.slot_mapping, slots + [-1] * 3, torch.int64),
        "block_table": (batch.attention.block_table, [[5, 9], [1, 0]], torch.int32)}
    for name, (tensor, values, dtype) in expected.items():
        assert tensor.tolist() == values and tensor.dtype == dtype, name
    assert batch.attention.query_lens_host.tolist() == [35, 2] and batch.attention.seq_lens_host.tolist() == [35, 2]
    assert batch.num_tokens == 37


def test_batch_of_new_requests(states: RequestStates) -> None:
    """Whole prompts sample; a prompt cut by the budget does not, and goes on where it stopped."""
    prompts = {0: list(range(20)), 1: list(range(30, 37)), 4: list(range(50, 90))}
    admit = [admission(row, ids, [2 * row, 2 * row + 1]) for row, ids in prompts.items()]
    batch = batch_of(states, plan(admit, [(0, 0, 20), (1, 0, 7), (4, 0, 13)]))
    assert batch.token_ids.tolist() == prompts[0] + prompts[1] + prompts[4][:13]
    assert batch.sampling.tolist() == [0, 1] and batch.logits_indices.tolist()[:2] == [19, 26]
    run_rows(states, batch, token=99)
    rest = batch_of(states, plan([], [(4, 13, 27)]))
    assert rest.token_ids.tolist()[:27] == prompts[4][13:] and rest.positions.tolist()[:27] == list(range(13, 40))
    assert rest.attention.slot_mapping.tolist()[18:20] == [8 * 32 + 31, 9 * 32] and rest.sampling.tolist() == [0]


def test_batch_of_cached_requests(states: RequestStates) -> None:
    """A prefix hit starts behind its cached blocks, reads them through the block table and writes none of them."""
    prompt = [i % 90 for i in range(70)]
    batch = batch_of(states, plan([admission(1, prompt, [11, 12, 30], num_computed=64)], [(1, 64, 6)]))
    assert batch.token_ids.tolist()[:6] == prompt[64:] and batch.positions.tolist()[:6] == list(range(64, 70))
    assert batch.attention.slot_mapping.tolist() == [30 * 32 + i for i in range(6)] + [-1, -1]
    assert batch.attention.block_table.tolist() == [[11, 12, 30]] and batch.attention.seq_lens.tolist() == [70]
    assert batch.sampling.tolist() == [0]
    # a decode: the row's last sampled token, one position on
    run_rows(states, batch, token=42)
    decode = batch_of(states, plan([], [(1, 70, 1)]))
    assert (decode.token_ids[0].item(), decode.positions[0].item()) == (42, 70)
    assert decode.attention.slot_mapping.tolist() == [30 * 32 + 6, -1, -1, -1]


def test_batch_of_mixed_requests(states: RequestStates) -> None:
    """Decodes, a chunk in the middle of a prompt, a new and a resumed request in one step."""
    run_rows(states, batch_of(states, plan([admission(0, [1, 2, 3], [0]), admission(5, list(range(60)), [6, 7])],
                                           [(0, 0, 3), (5, 0, 20)])), token=77)
    resumed = admission(2, [8, 9, 10, 11], [3], prompt_len=2)
    batch = batch_of(states, plan([resumed, admission(3, [5], [8])], [(0, 3, 1), (5, 20, 10), (2, 0, 4), (3, 0, 1)]))
    assert batch.token_ids.tolist()[:16] == [77, *range(20, 30), 8, 9, 10, 11, 5]
    assert batch.positions.tolist()[:16] == [3, *range(20, 30), 0, 1, 2, 3, 0]
    assert batch.attention.query_start_loc.tolist() == [0, 1, 11, 15, 16]
    assert batch.attention.seq_lens.tolist() == [4, 30, 4, 1]
    assert batch.sampling.tolist() == [0, 2, 3] and batch.logits_indices.tolist() == [0, 14, 15, 0]


def test_growth_appends_blocks_in_order(states: RequestStates) -> None:
    run_rows(states, batch_of(states, plan([admission(0, list(range(32)), [9])], [(0, 0, 32)])), token=1)
    batch = batch_of(states, plan([], [(0, 32, 1)], grow=[(0, 20), (0, 4)]))
    assert states.block_table[0, :3].tolist() == [9, 20, 4] and states.num_row_blocks[0] == 3
    assert batch.attention.slot_mapping.tolist() == [20 * 32, -1, -1, -1]
    assert batch.attention.block_table.tolist() == [[9, 20]]


def test_failed_row_repeats_its_last_token(states: RequestStates) -> None:
    batch_of(states, plan([admission(0, [5, 6], [0]), admission(1, [7], [1])], [(0, 0, 2), (1, 0, 1)]))
    appended = states.append(np.array([0, 1]), torch.tensor([-5, 50]), torch.tensor([True, False]))
    assert appended.tolist() == [6, 50] and states.num_tokens[:2].tolist() == [3, 2]
    assert states.token_ids[0, :3].tolist() == [5, 6, 6]


def test_padding_can_be_switched_off(states: RequestStates) -> None:
    batch = batch_of(states, plan([admission(0, [5], [0])], [(0, 0, 1)]), RowBuckets(enabled=False))
    assert len(batch.token_ids) == 1 and len(batch.logits_indices) == 1


def good_plan() -> StepPlan:
    """Row 0 of the states below decodes; row 1 is new."""
    return plan([admission(1, [1, 2, 3], [2])], [(0, 3, 1), (1, 0, 3)], grow=[(0, 3)])


def with_admission(**fields: object) -> Callable[[StepPlan], StepPlan]:
    return lambda step: msgspec.structs.replace(step, admit=[msgspec.structs.replace(step.admit[0], **fields)])


def with_plan(**fields: object) -> Callable[[StepPlan], StepPlan]:
    return lambda step: msgspec.structs.replace(step, **fields)


def with_params(**fields: object) -> Callable[[StepPlan], StepPlan]:
    return with_admission(params=TokenParams(max_tokens=8, **fields))


BAD_PLANS = {
    "row beyond the table": (with_plan(rows=i32_bytes([0, ROWS])), "rows: a row is not in"),
    "negative row": (with_plan(rows=i32_bytes([-1, 1])), "rows: a row is not in"),
    "row named twice": (with_plan(rows=i32_bytes([1, 1])), "rows: a row is named twice"),
    "row of nobody": (with_plan(rows=i32_bytes([0, 2])), "nobody is admitted"),
    "columns of other lengths": (with_plan(num_tokens=i32_bytes([1])), "num_tokens: 1 values, expected 2"),
    "half a value": (with_plan(rows=b"\0\0\0"), "no whole number"),
    "other num_computed": (with_plan(num_computed=i32_bytes([2, 0])), "num_computed: differs"),
    "no tokens": (with_plan(num_tokens=i32_bytes([0, 3])), "num_tokens: below 1"),
    "negative tokens": (with_plan(num_tokens=i32_bytes([1, -3])), "num_tokens: below 1"),
    "more tokens than known": (with_plan(num_tokens=i32_bytes([1, 4])), "more than the row's known"),
    "restart forgets rows": (with_plan(restart_after=0), "grow: a row that nobody"),
    "growth of nobody": (with_plan(grow=i32_bytes([3, 0])), "grow: a row that nobody"),
    "growth beyond the table": (with_plan(grow=i32_bytes([ROWS, 0])), "grow: a row that nobody"),
    "growth by an unknown block": (with_plan(grow=i32_bytes([0, BLOCKS])), "grow: a block id"),
    "growth beyond max_model_len": (with_plan(grow=i32_bytes([0, 1] * 6)), "grow: a row of more than 5 blocks"),
    "half a growth": (with_plan(grow=i32_bytes([0])), "grow: not pairs"),
    "admission beyond the table": (with_admission(req_idx=ROWS), "there are 6 rows"),
    "admission named twice": (lambda step: msgspec.structs.replace(step, admit=step.admit * 2), "admit: a row is named twice"),
    "token id of the vocabulary's size": (with_admission(token_ids=i32_bytes([1, 2, VOCAB])), "token id is not in"),
    "negative token id": (with_admission(token_ids=i32_bytes([-1, 2, 3])), "token id is not in"),
    "no tokens at all": (with_admission(token_ids=b"", prompt_len=0), "prompt_len 0 of 0"),
    "prompt longer than the tokens": (with_admission(prompt_len=4), "prompt_len 4 of 3"),
    "too many tokens": (with_admission(token_ids=i32_bytes([1] * (MAX_LEN + 1))), "max_model_len 160"),
    "nothing left to compute": (with_admission(num_computed=3), "num_computed 3 of 3"),
    "computed tokens without blocks": (with_admission(num_computed=1, block_ids=b""), "in 0 blocks"),
    "tokens without blocks": (with_admission(block_ids=b""), "beyond the row's blocks"),
    "unknown block": (with_admission(block_ids=i32_bytes([BLOCKS])), "block id is not in"),
    "too many blocks": (with_admission(block_ids=i32_bytes(range(6))), "6 blocks, at most 5"),
    "seed too large": (with_admission(seed=2**64), "seed"),
    "lora": (with_admission(lora_id=1), "no LoRA"),
    "stop id beyond the vocabulary": (with_params(stop_token_ids=i32_bytes([VOCAB])), "name a token id"),
    "bias id beyond the vocabulary": (with_params(logit_bias_ids=i32_bytes([-4]), logit_bias_values=i32_bytes([0])), "name a token id"),
    "bias without values": (with_params(logit_bias_ids=i32_bytes([4])), "logit_bias: 0 values, expected 1"),
    "bad word longer than its ids": (with_params(bad_words_ids=i32_bytes([4]), bad_words_lengths=i32_bytes([2])), "bad_words: 1 values"),
    "bad word without ids": (with_params(bad_words_ids=b"", bad_words_lengths=i32_bytes([0])), "a bad word without tokens"),
    "bad word beyond the vocabulary": (with_params(bad_words_ids=i32_bytes([3, VOCAB, 4]), bad_words_lengths=i32_bytes([3])), "bad_words_ids name"),
    "negative id in a bad word": (with_params(bad_words_ids=i32_bytes([3, -1, 4]), bad_words_lengths=i32_bytes([3])), "bad_words_ids name"),
    "drafts nobody counts": (with_plan(drafts=i32_bytes([4])), "drafts: without num_drafts"),
    "fewer drafts": (with_plan(num_drafts=i32_bytes([1, 1]), drafts=i32_bytes([4])), "drafts: other ones"),
    "negative drafts": (with_plan(num_drafts=i32_bytes([-1, 1]), drafts=b""), "drafts: other ones"),
    "drafts of fewer rows": (with_plan(num_drafts=i32_bytes([1]), drafts=i32_bytes([4])), "num_drafts: 1 values, expected 2"),
    "drafts of a prompt": (with_plan(num_drafts=i32_bytes([0, 1]), drafts=i32_bytes([4])), "drafts: of a row that does not decode"),
    "several steps of a prompt": (with_plan(num_steps=2), "num_steps, drafts: of a row"),
    "copies": (with_plan(copies=i32_bytes([0, 0, 0, 1])), "copies"),
    "control": (with_plan(control=[(1, b"")]), "control"),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_bad_plan_is_refused_before_anything_is_touched(states: RequestStates, name: str) -> None:
    run_rows(states, batch_of(states, plan([admission(0, [4, 5, 6], [0])], [(0, 0, 3)])), token=7)
    check_plan(good_plan(), states)
    change, message = BAD_PLANS[name]
    tables = (states.token_ids.numpy(), states.block_table, states.num_row_blocks, states.num_tokens, states.num_computed)
    before = [table.copy() for table in tables]
    with pytest.raises(BadPlan, match=message.replace("(", r"\(")):
        check_plan(change(good_plan()), states)
    assert all((table == old).all() for table, old in zip(tables, before, strict=True))


def test_sample_beyond_max_model_len_is_refused(states: RequestStates) -> None:
    full = plan([admission(0, [1] * MAX_LEN, [0, 1, 2, 3, 4])], [(0, 0, MAX_LEN)])
    with pytest.raises(BadPlan, match="beyond max_model_len"):
        check_plan(full, states)
    check_plan(msgspec.structs.replace(full, num_tokens=i32_bytes([MAX_LEN - 1])), states)
