"""From a client's Generate to token ids and resolved parameters, or one clear BadRequest.

Called by ``process``, on its own thread for short prompts and on the tokenizer's thread
for long ones; holds nothing that changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from frontend.chat_template import ChatTemplate
from frontend.tokenizer import Tokenizer
from protocol.codec import ColumnError, i32_bytes, i32_column
from protocol.config import EngineConfig
from protocol.messages import EngineReady, Generate
from protocol.sampling_params import BadRequest, TokenParams, check_token_ids, resolve

# Seams of the wire whose feature this engine does not have: refused, never ignored.
UNSUPPORTED = ("have_tokens", "have_chars", "deadline_ns", "tenant", "lora_id", "grammar")


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What the engine told at its handshake."""

    vocab_size: int
    max_model_len: int               # tokens
    eos_token_ids: tuple[int, ...]


def limits_of(ready: EngineReady, eos_token_ids: Iterable[int]) -> Limits:
    """``eos_token_ids``: the tokenizer's.  One that the model cannot produce ends nothing and is left out."""
    eos = {*eos_token_ids, *i32_column(ready.eos_token_ids).tolist()}
    return Limits(ready.vocab_size, ready.max_model_len, tuple(sorted(token for token in eos if 0 <= token < ready.vocab_size)))


class Intake:
    """Checks and tokenizes requests for one model."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, config: EngineConfig) -> None:
        self.tokenizer, self.template = tokenizer, template
        self._policy = config.scheduler.scheduling_policy
        self._defaults = tokenizer.generation_defaults if config.model.generation_config == "auto" else {}

    def prepare(self, generate: Generate, limits: Limits) -> tuple[bytes, TokenParams]:
        """Prompt ids (i32[n]) and parameters of ``generate``.  Raises BadRequest."""
        self._check_request(generate)
        prompt_ids = self._prompt_ids(generate, limits.vocab_size)
        bad_words = self.tokenizer.bad_words_ids(generate.params.bad_words) if generate.params.bad_words else []
        try:
            params = resolve(
                generate.params, vocab_size=limits.vocab_size, prompt_len=len(prompt_ids),
                max_model_len=limits.max_model_len, defaults=self._defaults, bad_words_ids=bad_words,
                eos_token_ids=list(limits.eos_token_ids))
        except ColumnError as error:
            raise BadRequest("params", str(error), "bad_frame") from None
        return i32_bytes(prompt_ids), params

    def _check_request(self, generate: Generate) -> None:
        given = [name for name in ("text", "token_ids", "messages") if getattr(generate, name) is not None]
        if len(given) != 1:
            raise BadRequest("prompt", f"was given as {' and '.join(given) or 'nothing'};"
                             " allowed: exactly one of text, token_ids and messages")
        for field in UNSUPPORTED:
            if getattr(generate, field) is not None:
                raise BadRequest(field, "is not supported by this engine; leave it out", "unsupported")
        if generate.priority != 0 and self._policy != "priority":
            raise BadRequest("priority", f"was {generate.priority}, but the engine runs with"
                             " --scheduling-policy fcfs; allowed: 0, or start it with 'priority'")

    def _prompt_ids(self, generate: Generate, vocab_size: int) -> np.ndarray | list[int]:
        if generate.text is not None:
            ids = self.tokenizer.encode(generate.text)
        elif generate.messages is not None:
            if self.template is None:
                raise BadRequest("messages", "the model has no chat template; allowed: text or token ids")
            ids = self.template.render(generate.messages)
        else:
            try:
                ids = i32_column(generate.token_ids, name="token_ids")
            except ColumnError as error:
                raise BadRequest("prompt", str(error), "bad_frame") from None
        check_token_ids("prompt", ids, vocab_size)    # a tokenizer may know more tokens than the model
        return ids
