"""Text to token ids and back, and what a checkpoint says about generation.

Owned by the frontend process; used by its loop and by the thread for long prompts, so
nothing here changes after loading.  ``tokenizers`` does the work, not transformers.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import tokenizers

from protocol.sampling_params import DEFAULTS, BadRequest, SamplingParams


SPACE_FIRST = '"prepend_scheme":"first"'     # of tokenizer.json: a space before what starts a text
SPACE_NEVER = '"prepend_scheme":"never"'


class TokenizerError(ValueError):
    """The checkpoint's tokenizer cannot be used; the message names the file."""


class Tokenizer:
    """The tokenizer of one checkpoint directory."""

    def __init__(self, model_dir: str | Path) -> None:
        self.model_dir = Path(model_dir)
        self._file = self.model_dir / "tokenizer.json"
        self._tokenizer = self._load()
        self.config = read_json(self.model_dir / "tokenizer_config.json")
        self._generation = read_json(self.model_dir / "generation_config.json")
        self.special_tokens = {token.content: (i, token) for i, token in
                               self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self.eos_token_ids = self._eos_token_ids()
        self._add_bos: bool | None = self.config.get("add_bos_token")
        self._bos_id = self.token_id("bos_token")

    @functools.cached_property
    def generation_defaults(self) -> dict[str, Any]:
        """The sampling values of generation_config.json; TokenizerError for one out of range."""
        values = {field: self._generation[field] for field in DEFAULTS if self._generation.get(field) is not None}
        try:
            SamplingParams(**values)
        except BadRequest as error:
            raise TokenizerError(f"{self.model_dir / 'generation_config.json'}: {error};"
                                 " or ignore it with --generation-config vllm") from None
        return values

    def encode(self, text: str) -> list[int]:
        """``text`` as it stands: special tokens are parsed, BOS is put where the checkpoint says so."""
        ids = self._tokenizer.encode(text, add_special_tokens=True).ids
        starts_with_bos = bool(ids) and ids[0] == self._bos_id
        if self._add_bos and not starts_with_bos and self._bos_id is not None:
            return [self._bos_id, *ids]
        if self._add_bos is False and starts_with_bos:
            return self.encode_rendered(text)
        return ids

    def encode_rendered(self, text: str) -> list[int]:
        """Special tokens are parsed; none is added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_plain(self, text: str, at_start: bool = True) -> list[int]:
        """Nothing in ``text`` becomes a special token; without ``at_start`` it follows one."""
        return (self._plain if at_start else self._plain_inside).encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token on its own, special ones too."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_id(self, role: str) -> int | None:
        """The id of ``bos_token``, ``eos_token``, … of tokenizer_config.json."""
        text = self.special_text(role)
        return None if text is None else self._tokenizer.token_to_id(text)

    def special_text(self, role: str) -> str | None:
        value = self.config.get(role)
        return value.get("content") if isinstance(value, dict) else value

    def bad_words_ids(self, words: list[str]) -> list[list[int]]:
        """Each word as it starts a text and, where that is as long, as it follows a space."""
        found = []
        for word in words:
            bare = word.lstrip() or word
            first = self.encode_rendered(bare)
            after_space = self.encode_rendered(" " + bare)
            if not first:
                raise BadRequest("bad_words", f"{word!r} has no tokens; allowed: strings that have some")
            found.append(first)
            if len(after_space) == len(first) and after_space[0] != first[0]:
                found.append(after_space)
        return found

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A second instance: the switch is a property of the whole tokenizer."""
        plain = self._load()
        plain.encode_special_tokens = True
        return plain

    @functools.cached_property
    def _plain_inside(self) -> tokenizers.Tokenizer:
        """The same for what does not start a text."""
        content = self._tokenizer.to_str()
        if SPACE_FIRST not in content:
            return self._plain
        inside = tokenizers.Tokenizer.from_str(content.replace(SPACE_FIRST, SPACE_NEVER))
        inside.encode_special_tokens = True
        return inside

    def _load(self) -> tokenizers.Tokenizer:
        if not self._file.is_file():
            other = self.model_dir / "tokenizer.model"
            hint = " (tokenizer.model alone is not read)" if other.is_file() else ""
            raise TokenizerError(f"{self._file}: no such file{hint}; a model directory needs it")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(self._file))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{self._file}: not a readable tokenizer: {error}") from None
        tokenizer.no_truncation()   # many files were saved with a training run's limits
        tokenizer.no_padding()
        return tokenizer

    def _eos_token_ids(self) -> tuple[int, ...]:
        """Union of what config, generation_config and tokenizer say, ascending."""
        found: set[int] = set()
        for name in ("config.json", "generation_config.json"):
            value = read_json(self.model_dir / name).get("eos_token_id")
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(token) is int and abs(token) < 2**31 for token in ids):
                raise TokenizerError(f"{self.model_dir / name}: eos_token_id: was {value!r}; allowed: a token id, or a list of them")
            found.update(ids)
        own = self.token_id("eos_token")
        return tuple(sorted(found | ({own} if own is not None else set())))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} for a missing file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: was a {type(content).__name__}; allowed: an object")
    return content
