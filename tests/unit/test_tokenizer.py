"""Text to ids and back with the default model's tokenizer, and with small ones made here."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer as Library, decoders, models, pre_tokenizers, processors

from frontend.tokenizer import Tokenizer, TokenizerError
from protocol.sampling_params import BadRequest

GOLDEN_TEXT = "The 2024 budget: 1,234.50€  (naïve 日本)"
GOLDEN_IDS = [504, 216, 34, 32, 34, 36, 6050, 42, 216, 33, 28, 34, 35, 36, 30, 37, 32, 14195, 216, 365, 3546, 46494,
              17097, 241, 115, 40993, 25]


@pytest.fixture(scope="module")
def tokenizer(default_model_dir):
    return Tokenizer(default_model_dir)


def write_small(path, add_bos=None, with_bos_processor=False, generation=None, config=None):
    """Bytes as tokens 2 …, <s> = 0 and </s> = 1 before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    library = Library(models.BPE(vocab=vocab, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    if with_bos_processor:
        library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    library.save(str(path / "tokenizer.json"))
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    if add_bos is not None:
        settings["add_bos_token"] = add_bos
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "generation_config.json").write_text(json.dumps(generation or {}))
    (path / "config.json").write_text(json.dumps(config or {}))
    return path


def test_golden_ids(tokenizer):
    assert tokenizer.encode(GOLDEN_TEXT) == GOLDEN_IDS
    assert tokenizer.decode(GOLDEN_IDS) == GOLDEN_TEXT


def test_special_tokens_are_parsed_in_raw_text_only(tokenizer):
    assert tokenizer.encode("<|im_start|>a")[0] == 1
    assert 1 not in tokenizer.encode_plain("<|im_start|>a")
    assert tokenizer.decode(tokenizer.encode_plain("<|im_start|>a")) == "<|im_start|>a"


@pytest.mark.parametrize(("add_bos", "processor", "expected"), [
    (None, False, False), (None, True, True), (True, False, True), (True, True, True), (False, True, False)])
def test_bos_as_the_checkpoint_says(tmp_path, add_bos, processor, expected):
    ids = Tokenizer(write_small(tmp_path, add_bos, processor)).encode("ab")
    assert (ids.count(0), ids[0] == 0, len(ids)) == (int(expected), expected, 2 + expected)


def test_eos_is_the_union_of_three_files(tmp_path):
    write_small(tmp_path, generation={"eos_token_id": [7, 5]}, config={"eos_token_id": 9})
    assert Tokenizer(tmp_path).eos_token_ids == (1, 5, 7, 9)


@pytest.mark.parametrize("value", ["</s>", [1, "2"], 1.5, True, {"id": 2}])
def test_wrong_eos_is_named(tmp_path, value):
    write_small(tmp_path, generation={"eos_token_id": value})
    with pytest.raises(TokenizerError, match="generation_config.json: eos_token_id: was .*; allowed: a token id, or a list of them"):
        Tokenizer(tmp_path)


def test_generation_defaults(tmp_path):
    write_small(tmp_path, generation={"temperature": 0.6, "top_p": 0.9, "top_k": None, "do_sample": True})
    assert Tokenizer(tmp_path).generation_defaults == {"temperature": 0.6, "top_p": 0.9}


def test_wrong_generation_default_is_named(tmp_path):
    write_small(tmp_path, generation={"temperature": -1})
    tokenizer = Tokenizer(tmp_path)         # may be told to ignore that file
    with pytest.raises(TokenizerError, match="generation_config.json: temperature: was -1.*--generation-config vllm"):
        tokenizer.generation_defaults


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(TokenizerError, match="tokenizer.json: no such file; "):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(TokenizerError, match="tokenizer.model alone is not read"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="not a readable tokenizer"):
        Tokenizer(tmp_path)


def test_bad_words_at_the_start_and_after_a_space(tokenizer):
    found = tokenizer.bad_words_ids([" Paris"])
    assert [tokenizer.decode(ids) for ids in found] == ["Paris", " Paris"]


def test_a_special_token_as_a_bad_word(tokenizer):
    assert [2] in tokenizer.bad_words_ids(["<|im_end|>"])


def test_limits_of_a_training_run_are_not_ours(tmp_path):
    path = write_small(tmp_path) / "tokenizer.json"
    library = Library.from_file(str(path))
    library.enable_truncation(4)
    library.enable_padding(length=8)
    library.save(str(path))
    tokenizer = Tokenizer(tmp_path)
    assert len(tokenizer.encode("abcdef")) == len(tokenizer.encode_plain("abcdef")) == 6
    assert len(tokenizer.encode("ab")) == 2


def test_a_bad_word_without_tokens_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "encode_rendered", lambda text: [])
    with pytest.raises(BadRequest, match="bad_words: 'x' has no tokens"):
        tokenizer.bad_words_ids(["x"])
