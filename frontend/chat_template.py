"""Conversations to token ids through the model's own chat template.

Owned by the frontend process.  What a caller writes into a message never becomes a special
token: control strings in it are broken by a sentinel before rendering, and the rendered
text is then encoded piece by piece between the template's own special tokens.
"""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from frontend.tokenizer import Tokenizer, TokenizerError
from protocol.messages import ChatMessage
from protocol.sampling_params import BadRequest

SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
PRIVATE_USE = range(0xE000, 0xF900)        # code points without a meaning of their own


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TokenizerError(f"{tokenizer.model_dir}: the chat template is no valid jinja2: {error}") from None
        texts = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._heads = tuple({text[:end] for text in texts for end in range(1, len(text))})
        self._tails = tuple({text[start:] for text in texts for start in range(1, len(text))})
        self._variables = {role: tokenizer.special_text(role) or "" for role in SPECIAL_ROLES}

    @classmethod
    def load(cls, model_dir: str | Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The checkpoint's template, from its own file or tokenizer_config.json; None if it has none."""
        own_file = Path(model_dir) / "chat_template.jinja"
        source = own_file.read_text(encoding="utf-8") if own_file.is_file() else tokenizer.config.get("chat_template")
        if isinstance(source, list):    # several, by name
            source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
        return None if source is None else cls(source, tokenizer)

    def render(self, messages: list[ChatMessage]) -> list[int]:
        """The prompt that asks for the next answer.  Raises BadRequest."""
        if self._specials is None:
            return self._tokenizer.encode_rendered(self._text(messages))
        sentinel = _unused_character(messages)
        broken = [ChatMessage(self._broken(m.role, sentinel), self._broken(m.content, sentinel)) for m in messages]
        if broken == messages:
            return self._tokenizer.encode_rendered(self._text(messages))
        return self._encode_pieces(self._text(broken), sentinel)

    def _text(self, messages: list[ChatMessage]) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, tools=None,
                                         documents=None, **self._variables)
        except Exception as error:      # a template is a program
            raise BadRequest("messages", f"the model's chat template refuses them: {error}") from None

    def _broken(self, text: str, sentinel: str) -> str:
        """``text`` that holds no control string, and makes none with what the template puts around it."""
        text = self._specials.sub(lambda match: sentinel.join(match.group()), text)
        body = text.strip()             # templates trim
        before = sentinel if body.startswith(self._tails) else ""
        after = sentinel if body.endswith(self._heads) else ""
        if not before and not after:
            return text
        start = text.index(body)
        return text[:start] + before + body + after + text[start + len(body):]

    def _encode_pieces(self, text: str, sentinel: str) -> list[int]:
        ids: list[int] = []
        start, strip_left = 0, False
        for match in [*self._specials.finditer(text), None]:
            piece = text[start:match.start() if match else None]
            index, token = self._tokenizer.special_tokens[match.group()] if match else (None, None)
            piece = piece.lstrip() if strip_left else piece
            piece = piece.rstrip() if token is not None and token.lstrip else piece
            ids += self._tokenizer.encode_plain(piece.replace(sentinel, ""), at_start=start == 0)
            if match:
                ids.append(index)
                start, strip_left = match.end(), token.rstrip
        return ids


def _unused_character(messages: list[ChatMessage]) -> str:
    texts = [text for message in messages for text in (message.role, message.content)]
    usual = chr(PRIVATE_USE[0])
    if not any(usual in text for text in texts):
        return usual
    used = set().union(*texts)
    for code in PRIVATE_USE:
        if chr(code) not in used:
            return chr(code)
    raise BadRequest("messages", "use every private-use character of Unicode; allowed: all but one")


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates on the hub expect to find."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, GenerationBlock])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    return environment


class GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}`` marks answers for training; here it is its content."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """Without jinja2's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
