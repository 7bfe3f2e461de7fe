"""Tokenizers built from a GGUF file's fields."""

import pytest
from tokenizers import pre_tokenizers

from gpu_worker.models.converted import ConversionError
from gpu_worker.models.gguf_tokenizer import SPLITS, build

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
CONTROL, USER_DEFINED, NORMAL = 3, 4, 1
TEXT = "I'LL pay 12345 $3.50!!\n\n x  y"
PIECES = {      # by hand, from the expressions in each model's own tokenizer or in llama.cpp
    "gpt-2": "I|'|LL| pay| 12345| $|3|.|50|!!|\n\n| x| | y",
    "smollm": "I|'|LL| pay| |1|2|3|4|5| $|3|.|5|0|!!|\n\n| x| | y",
    "default": "I|'|LL| pay| |123|45| |$|3|.|50|!!|\n\n| x| | y",
    "llama-bpe": "I|'LL| pay| |123|45| $|3|.|50|!!\n\n| x| | y",
    "qwen2": "I|'LL| pay| |1|2|3|4|5| $|3|.|5|0|!!\n\n| x| | y",
}


def fields(pre="gpt-2", more=(), merges=("a b",), **changes):
    """<s> = 0, </s> = 1, <tool> = 2 (text that users may write), then all bytes, "ab", then ``more``."""
    tokens = ["<s>", "</s>", "<tool>", *ALPHABET, "ab", *more]
    values = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges and list(merges), "bos_token_id": 0, "eos_token_id": 1,
              "token_type": [CONTROL, CONTROL, USER_DEFINED] + [NORMAL] * (len(tokens) - 3)} | changes
    return {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not None}


def test_every_pre_tokenizer_is_tested():
    assert set(PIECES) == set(SPLITS)


@pytest.mark.parametrize("pre", PIECES)
def test_where_text_is_cut(pre):
    tokenizer, _ = build(fields(pre))
    pieces = [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert pieces == PIECES[pre].split("|")


@pytest.mark.parametrize("pre", PIECES)
def test_text_comes_back(pre):
    tokenizer, _ = build(fields(pre))
    for text in (TEXT, "naïve 日本 👩‍👩‍👧\t\r\n", "abab <tool> ab"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text


def test_control_tokens_are_special_and_user_defined_ones_are_not():
    tokenizer, _ = build(fields())
    ids = tokenizer.encode("a<tool></s>").ids
    assert ids[1:] == [2, 1]
    assert tokenizer.decode(ids) == "a<tool>"


@pytest.mark.parametrize(("options", "around"), [
    ({}, ([], [])), ({"pre": "llama-bpe"}, ([0], [])), ({"pre": "llama-bpe", "add_bos_token": False}, ([], [])),
    ({"add_bos_token": True}, ([0], [])), ({"add_bos_token": True, "add_eos_token": True}, ([0], [1])),
    ({"add_eos_token": True}, ([], [1]))])
def test_bos_and_eos_as_the_file_says(options, around):
    tokenizer, config = build(fields(**options))
    plain = tokenizer.encode("ab", add_special_tokens=False).ids
    assert tokenizer.encode("ab").ids == [*around[0], *plain, *around[1]]
    assert (config["add_bos_token"], config["bos_token"], config["eos_token"]) == (bool(around[0]), "<s>", "</s>")


def test_a_whole_word_that_is_a_token_needs_no_merges():
    ids = {pre: build(fields(pre, more=["abc"]))[0].encode("abc", add_special_tokens=False).ids for pre in PIECES}
    assert {pre for pre in PIECES if len(ids[pre]) == 1} == {"llama-bpe"}


def test_qwen2_composes_characters():
    decomposed, composed = "e\u0301", "\u00e9"
    for pre in PIECES:
        tokenizer, _ = build(fields(pre))
        assert (tokenizer.encode(decomposed).ids == tokenizer.encode(composed).ids) == (pre == "qwen2")


@pytest.mark.parametrize(("options", "message"), [
    ({"model": "llama"}, "tokenizer.ggml.model: was 'llama'; allowed: 'gpt2'"),
    ({"pre": "tekken"}, "tokenizer.ggml.pre: was 'tekken'; allowed: default, gpt-2, smollm, llama-bpe, qwen2"),
    ({"tokens": None}, "tokenizer.ggml.tokens: missing"), ({"merges": None}, "tokenizer.ggml.merges: missing"),
    ({"token_type": [1]}, "tokenizer.ggml.token_type: 1 values for 260 tokens"),
    ({"add_bos_token": True, "bos_token_id": None}, "the file does not name that token")])
def test_refusals(options, message):
    with pytest.raises(ConversionError, match=message):
        build(fields(**options))
