"""A GGUF file's tokenizer as tokenizer.json and tokenizer_config.json.

Used by ``gguf_checkpoint``.  Byte-level BPE only (``tokenizer.ggml.model = gpt2``), with the
pre-tokenizers listed here: another one would split text otherwise than the model learnt it,
so it is refused by name.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CONTROL, USER_DEFINED = 3, 4      # tokenizer.ggml.token_type
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {"llama-bpe": _LETTERS + r"|\p{N}{1,3}" + _REST, "qwen2": _LETTERS + r"|\p{N}" + _REST}
PRE_TOKENIZERS = ("default", "gpt-2", "smollm", *SPLITS)


class TokenizerRefused(ValueError):
    """The file's tokenizer is one that we do not have."""


def build(fields: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """(tokenizer, content of tokenizer_config.json) from a GGUF file's ``tokenizer.*`` fields."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise TokenizerRefused(f"tokenizer.ggml.model: was {kind!r}; allowed: 'gpt2' (byte-level BPE)")
    if pre not in PRE_TOKENIZERS:
        raise TokenizerRefused(f"tokenizer.ggml.pre: was {pre!r}; allowed: {', '.join(PRE_TOKENIZERS)}")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges,
                                     ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    added = [AddedToken(token, special=kind == CONTROL, normalized=False)
             for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens(added)
    config = _config(fields, tokens)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if config["add_bos_token"]:
        tokenizer.post_processor = _with_bos(config["bos_token"], tokens)
    return tokenizer, config


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre in SPLITS:
        return pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    return plain


def _with_bos(bos: str | None, tokens: list[str]) -> processors.TemplateProcessing:
    if bos is None:
        raise TokenizerRefused("tokenizer.ggml.add_bos_token: is set, but tokenizer.ggml.bos_token_id is not")
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))])


def _config(fields: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    def named(role: str) -> str | None:
        index = fields.get(f"tokenizer.ggml.{role}_token_id")
        return None if index is None else tokens[index]

    add_bos = fields.get("tokenizer.ggml.add_bos_token", fields.get("tokenizer.ggml.pre") == "llama-bpe")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(add_bos), "bos_token": named("bos"), "eos_token": named("eos"),
        "unk_token": named("unknown"), "pad_token": named("padding"),
    }
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config
