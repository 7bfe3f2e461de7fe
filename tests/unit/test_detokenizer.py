"""Incremental text: equal to decoding all at once, cut exactly at stop strings."""

import random

import pytest
from tokenizers import Tokenizer as Library, decoders, models

from frontend.detokenizer import MAX_WINDOW_TOKENS, Detokenizer
from frontend.tokenizer import Tokenizer
from protocol.codec import i32_bytes
from protocol.sampling_params import SamplingParams, to_wire

TEXT = "naïve 日本語 👩‍👩‍👧 émoji 🎉 done.\n\n  def f(x):\treturn 𝕏 + \ufffd ok " * 3


@pytest.fixture(scope="module")
def tokenizer(default_model_dir):
    return Tokenizer(default_model_dir)


@pytest.fixture(scope="module")
def sentencepiece_like():
    """Byte tokens, words and pieces, as the Llama 2 family has them."""
    tokens = ["<s>", "▁", "a", "b", "▁ab", "▁the", ",", "é", "日"] + [f"<0x{byte:02X}>" for byte in range(256)]
    library = Library(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], byte_fallback=True))
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])

    class SentencePieceLike:
        def byte(self, value):
            return tokens.index(f"<0x{value:02X}>")

        def decode(self, ids, skip_special_tokens=True):
            return library.decode(ids, skip_special_tokens=skip_special_tokens)

    return SentencePieceLike()


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


def test_the_prompts_end_is_not_repeated(tokenizer):
    """A character U+FFFD is whole; half a character is given out when it has become whole."""
    texts, _ = run(tokenizer, [tokenizer.encode("b")], prompt=tokenizer.encode("a\ufffd"))
    assert texts == ["b", ""]
    ids = tokenizer.encode("🎉")
    assert "".join(run(tokenizer, [ids[-1:]], prompt=ids[:-1])[0]) == "🎉"
    assert "".join(run(tokenizer, [tokenizer.encode("b")], prompt=ids[:-1])[0]) == "b"


def test_bytes_that_never_become_a_character_are_given_out(tokenizer):
    half = tokenizer.encode("🎉")[-1]             # a byte that only continues characters
    assert tokenizer.decode([half]) == "\ufffd"
    texts, detokenizer = run(tokenizer, [[half]] * 100)
    assert "".join(texts) == "\ufffd" * 100
    assert texts[50] == "\ufffd" and len(texts[-1]) == 3
    assert len(detokenizer._decoder._window) <= MAX_WINDOW_TOKENS


@pytest.mark.parametrize("seed", range(40))
def test_characters_in_bytes(sentencepiece_like, seed):
    """A decoder of the other kind, which takes back characters before a half one."""
    generator = random.Random(seed)
    ids = []
    for _ in range(40):
        if generator.random() < 0.2:                  # a lone byte that is no character, between words
            ids += [2, sentencepiece_like.byte(generator.randrange(0x80, 0x100)), 3]
        elif generator.random() < 0.5:
            ids += map(sentencepiece_like.byte, generator.choice("🎉日é𝕏z").encode())
        else:
            ids.append(generator.randrange(9))
    texts, _ = run(sentencepiece_like, lumps(ids, seed))
    assert "".join(texts) == sentencepiece_like.decode(ids)
    cut = generator.randrange(6, 40)
    while sentencepiece_like.decode(ids[:cut]).endswith("\ufffd"):
        cut += 1
    texts, _ = run(sentencepiece_like, lumps(ids[cut:], seed), prompt=ids[:cut])
    assert sentencepiece_like.decode(ids[:cut]) + "".join(texts) == sentencepiece_like.decode(ids)


@pytest.mark.parametrize("seed", range(20))
def test_a_resumed_stream_says_the_same(tokenizer, seed):
    """Pure: what a new detokenizer makes of all ids at once begins with what was delivered."""
    generator = random.Random(seed)
    ids = tokenizer.encode(TEXT)
    cut = generator.randrange(1, len(ids))
    params, min_tokens = {"stop": [TEXT[-9:-2]]}, generator.choice((0, 50))
    texts, first = run(tokenizer, lumps(ids, seed), min_tokens, **params)
    delivered = "".join(run(tokenizer, lumps(ids[:cut], seed), min_tokens, **params)[0][:-1])
    again = Detokenizer(tokenizer, b"", to_wire(SamplingParams(**params)), min_tokens)
    whole = again.push(ids) + again.finish()
    assert whole == "".join(texts) and whole.startswith(delivered)
    assert (again.stop_reason, again.num_tokens) == (first.stop_reason, first.num_tokens)
