"""A GGUF file's tokenizer as tokenizer.json and tokenizer_config.json.

Used by ``gguf_checkpoint``.  Byte-level BPE only (``tokenizer.ggml.model = gpt2``), with the
pre-tokenizers listed here: another one would split text otherwise than the model learnt it,
so it is refused by name.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gpu_worker.models.converted import ConversionError

CONTROL, USER_DEFINED = 3, 4      # tokenizer.ggml.token_type
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {                        # tokenizer.ggml.pre → expressions, each cutting the pieces that those before it left
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_WORDS + r"|\p{N}{1,3}" + _REST,),
    "qwen2": (_WORDS + r"|\p{N}" + _REST,),
}


def build(fields: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """(tokenizer, content of tokenizer_config.json) from a GGUF file's ``tokenizer.*`` fields."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ConversionError(f"tokenizer.ggml.model: was {kind!r}; allowed: 'gpt2' (byte-level BPE)")
    if pre not in SPLITS:
        raise ConversionError(f"tokenizer.ggml.pre: was {pre!r}; allowed: {', '.join(SPLITS)}")
    tokens, types = _tokens(fields)
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges,
                                     ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(expression), "isolated") for expression in SPLITS[pre]),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)
                          for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)])
    config = _config(fields, tokens)
    tokenizer.post_processor = _post_processor(config, tokens)
    return tokenizer, config


def _tokens(fields: dict[str, Any]) -> tuple[list[str], list[int]]:
    """All tokens and their types."""
    for name in ("tokens", "merges"):
        if f"tokenizer.ggml.{name}" not in fields:
            raise ConversionError(f"tokenizer.ggml.{name}: missing in the file")
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise ConversionError(f"tokenizer.ggml.token_type: {len(types)} values for {len(tokens)} tokens")
    return tokens, types


def _post_processor(config: dict[str, Any], tokens: list[str]) -> processors.PostProcessor:
    """BOS and EOS around a text, where the file asks for them."""
    before, after = ([config[f"{role}_token"]] if config[f"add_{role}_token"] else [] for role in ("bos", "eos"))
    if not before and not after:
        return processors.ByteLevel(trim_offsets=False)
    if None in before + after:
        raise ConversionError("tokenizer.ggml.add_bos_token or add_eos_token: is set, but the file does not name that token")
    return processors.TemplateProcessing(single=[*before, "$A", *after], pair=[*before, "$A", *after, *before, "$B", *after],
                                         special_tokens=[(token, tokens.index(token)) for token in {*before, *after}])


def _config(fields: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    def named(role: str) -> str | None:
        index = fields.get(f"tokenizer.ggml.{role}_token_id")
        return None if index is None else tokens[index]

    add_bos = fields.get("tokenizer.ggml.add_bos_token", fields.get("tokenizer.ggml.pre") == "llama-bpe")
    add_eos = fields.get("tokenizer.ggml.add_eos_token", False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(add_bos), "add_eos_token": bool(add_eos),
        "bos_token": named("bos"), "eos_token": named("eos"),
        "unk_token": named("unknown"), "pad_token": named("padding"),
    }
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config
