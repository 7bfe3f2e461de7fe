"""Figure 3, reduced: each circumstance once against alone, on the default model in bfloat16."""

import pytest

from determinism_matrix import ALONE, CIRCUMSTANCES, differences, make_workload, measure, ordinary_text
from frontend.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def records(default_model_dir):
    ids = Tokenizer(default_model_dir).encode(ordinary_text())
    work = make_workload(ids, count=8, max_tokens=16, num_others=63, longest=600)
    return {name: record for name, record, _ in measure(str(default_model_dir), [ALONE, *CIRCUMSTANCES], work)}


@pytest.mark.parametrize("name", [circumstance.name for circumstance in CIRCUMSTANCES])
def test_same_request_same_bits(records, name):
    record = records[name]
    assert len(record) >= 3
    assert differences(records[ALONE.name], record) == []


def test_the_requests_are_not_all_the_same(records):
    """A comparison of equal things would show nothing."""
    prints = records[ALONE.name].values()
    assert len({str(print_) for print_ in prints}) == len(prints)
    assert all(len(row) >= 5 for print_ in prints for _token, row in print_)
