"""Each circumstance once against alone, compared as hex: the default model in bfloat16, a random
one that the transformers backend runs, and a random one in the quantized modes."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from determinism_matrix import ALONE, CIRCUMSTANCES, differences, make_workload, measure, ordinary_text
from frontend.tokenizer import Tokenizer
from private_cache import use_private_cache

NAMES = [circumstance.name for circumstance in CIRCUMSTANCES]


def all_records(model_dir, **settings):
    work = make_workload(Tokenizer(model_dir).encode(ordinary_text()), count=9, longest=400, max_tokens=16)
    return {name: record for name, record, _ in measure(str(model_dir), [ALONE, *CIRCUMSTANCES], work, **settings)}


def small_records(model_dir, **settings):
    """Half of the circumstances beside the other half."""
    work = make_workload(Tokenizer(model_dir).encode(ordinary_text()), count=6, longest=300, max_tokens=48)
    every = [ALONE, *CIRCUMSTANCES]
    with ThreadPoolExecutor(2) as pool:
        halves = pool.map(lambda part: list(measure(str(model_dir), part, work, num_threads=2, **settings)), [every[::2], every[1::2]])
        return {name: record for half in halves for name, record, _ in half}


@pytest.fixture(scope="module")
def records(default_model_dir):
    return all_records(default_model_dir, dtype="bfloat16")


@pytest.fixture(scope="module")
def transformers_records(tmp_path_factory):
    from tiny_models import write_gpt_neox

    return small_records(write_gpt_neox(tmp_path_factory.mktemp("neox")), dtype="bfloat16")


@pytest.fixture(scope="module", params=[{"quantization": "int8"}, {"quantization": "int4", "kv_cache_dtype": "int8"}],
                ids=lambda settings: " ".join(settings.values()))
def quantized_records(request, tmp_path_factory):
    from tiny_models import write_byte_tokenizer, write_tiny_llama

    model_dir = write_tiny_llama(tmp_path_factory.mktemp("quantized"), vocab_size=288, hidden_size=96, intermediate_size=160,
                                 num_attention_heads=8, head_dim=16, max_position_embeddings=2048, tie_word_embeddings=True)
    write_byte_tokenizer(model_dir)
    with pytest.MonkeyPatch.context() as patch:
        use_private_cache(patch, tmp_path_factory.mktemp("cache"))
        return small_records(model_dir, **request.param)


def check(records, name):
    assert len(records[name]) >= 2
    assert differences(records[ALONE.name], records[name]) == []


@pytest.mark.parametrize("name", NAMES)
def test_same_request_same_bits(records, name):
    check(records, name)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_through_the_transformers_backend(transformers_records, name):
    check(transformers_records, name)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_in_the_quantized_modes(quantized_records, name):
    check(quantized_records, name)


def test_the_requests_are_not_all_the_same(records, transformers_records, quantized_records):
    """A comparison of equal things would show nothing."""
    for found in (records, transformers_records, quantized_records):
        prints = found[ALONE.name].values()
        assert len({str(print_) for print_ in prints}) == len(prints)
        assert all(len(row) >= 5 for print_ in prints for _token, row in print_)
