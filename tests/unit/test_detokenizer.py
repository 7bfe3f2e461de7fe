"""Incremental text: equal to decoding all at once, cut exactly at stop strings."""

import random

import pytest

from frontend.detokenizer import Detokenizer
from frontend.tokenizer import Tokenizer
from protocol.codec import i32_bytes
from protocol.sampling_params import SamplingParams, to_wire

TEXT = "naïve 日本語 👩‍👩‍👧 émoji 🎉 done.\n\n  def f(x):\treturn 𝕏 + \ufffd ok " * 3


@pytest.fixture(scope="module")
def tokenizer(default_model_dir):
    return Tokenizer(default_model_dir)


def lumps(ids, seed):
    generator = random.Random(seed)
    start = 0
    while start < len(ids):
        size = generator.randint(1, 6)
        yield ids[start:start + size]
        start += size


def run(tokenizer, pieces, min_tokens=0, prompt=(), **params):
    detokenizer = Detokenizer(tokenizer, i32_bytes(list(prompt)), to_wire(SamplingParams(**params)), min_tokens)
    texts = [detokenizer.push(piece) for piece in pieces]
    texts.append(detokenizer.finish())
    return texts, detokenizer


@pytest.mark.parametrize("seed", range(20))
def test_any_lumps_give_the_whole_text(tokenizer, seed):
    ids = tokenizer.encode(TEXT)
    texts, detokenizer = run(tokenizer, lumps(ids, seed), prompt=tokenizer.encode("日本")[:-1])
    assert "".join(texts) == TEXT
    assert detokenizer.num_tokens == len(ids)


@pytest.mark.parametrize("seed", range(20))
def test_random_ids_as_decoded_at_once(tokenizer, seed):
    """Invalid bytes too; what is given out early is never taken back."""
    generator = random.Random(seed)
    ids = [generator.randrange(17, 400) for _ in range(60)]
    texts, _ = run(tokenizer, lumps(ids, seed))
    assert "".join(texts) == tokenizer.decode(ids)


def test_half_a_character_waits(tokenizer):
    ids = tokenizer.encode("🎉")
    assert len(ids) > 1
    texts, _ = run(tokenizer, [[i] for i in ids])
    assert texts == [""] * (len(ids) - 1) + ["🎉", ""]


def test_half_a_character_is_flushed_at_the_end(tokenizer):
    ids = tokenizer.encode("a🎉")[:-1]
    texts, _ = run(tokenizer, [[i] for i in ids])
    assert "".join(texts) == tokenizer.decode(ids) and texts[-1].startswith("\ufffd")


def test_special_tokens(tokenizer):
    ids = tokenizer.encode("a<|im_end|>b")
    assert "".join(run(tokenizer, [ids])[0]) == "ab"
    assert "".join(run(tokenizer, [ids], skip_special_tokens=False)[0]) == "a<|im_end|>b"


@pytest.mark.parametrize("seed", range(60))
def test_stop_strings_cut_exactly(tokenizer, seed):
    """Against the definition: the first place in the whole text, by tokens one at a time."""
    generator = random.Random(seed)
    ids = tokenizer.encode(TEXT)
    start = generator.randrange(len(TEXT) - 12)
    stops = [TEXT[start:start + generator.randint(1, 12)], "absent"]
    include = generator.random() < 0.5
    texts, detokenizer = run(tokenizer, lumps(ids, seed), stop=stops, include_stop_str_in_output=include)
    at = TEXT.find(stops[0])
    assert "".join(texts) == TEXT[:at + len(stops[0]) * include]
    assert detokenizer.stop_reason == stops[0]
    completed = next(n for n in range(1, len(ids) + 1) if TEXT[:at + len(stops[0])] in tokenizer.decode(ids[:n]))
    assert detokenizer.num_tokens == completed


def test_the_beginning_of_a_stop_string_is_held_back(tokenizer):
    pieces = [tokenizer.encode(text) for text in ("ab", "STO", "X", "STO")]
    texts, detokenizer = run(tokenizer, pieces, stop="STOP")
    assert texts == ["ab", "", "STOX", "", "STO"]
    assert detokenizer.stop_reason is None


def test_of_two_stop_strings_the_first_in_the_text(tokenizer):
    texts, detokenizer = run(tokenizer, [tokenizer.encode("one two three")], stop=["three", "wo"])
    assert ("".join(texts), detokenizer.stop_reason) == ("one t", "wo")


def test_no_stop_string_before_min_tokens(tokenizer):
    ids = [token for word in ("x", " y", " x", " y", " x") for token in tokenizer.encode(word)]
    for min_tokens, expected in ((0, ""), (1, "x y "), (2, "x y "), (3, "x y x y "), (5, "x y x y x")):
        texts, detokenizer = run(tokenizer, [ids], min_tokens, stop="x")
        assert "".join(texts) == expected, min_tokens
        assert (detokenizer.stop_reason is None) == (min_tokens == 5)


def test_nothing_comes_after_the_end(tokenizer):
    texts, detokenizer = run(tokenizer, [tokenizer.encode("a. b"), tokenizer.encode(" c")], stop=".")
    assert texts == ["a", "", ""]
    assert detokenizer.push(tokenizer.encode("more")) == ""
