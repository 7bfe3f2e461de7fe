"""Token ids to text as they come, and the stop strings in it.

One per child stream, owned by the ledger.  Text is a pure function of the prompt's tail,
the output ids and the parameters: ids pushed one by one, in lumps, or all again after a
resumption give the same text.  Half a character is never given out; ``finish`` flushes it.
"""

from __future__ import annotations

import os

from frontend.tokenizer import Tokenizer
from protocol.codec import i32_column
from protocol.sampling_params import WireParams

CONTEXT_TOKENS = range(5, 9) # enough for decoders that join words by what stands before; where a character begins
MAX_WINDOW_TOKENS = 16
INCOMPLETE = "\ufffd"        # what a decoder makes of bytes that are no whole character
MAX_HALF_BYTES = 3           # of a character of UTF-8 that lacks its last


class Detokenizer:
    """``push`` ids, take text; ``stop_reason`` is set when a stop string has ended it."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: bytes, params: WireParams, min_tokens: int = 0) -> None:
        self.stop_reason: str | None = None      # the stop string that was found
        self.num_tokens = 0                      # consumed, the one that completed the stop string included
        self._decoder = _Decoder(tokenizer, i32_column(prompt_ids)[-MAX_WINDOW_TOKENS:].tolist(),
                                 params.skip_special_tokens)
        self._stops = _StopStrings(params.stop, params.include_stop_str_in_output)
        self._min_tokens = min_tokens

    def push(self, token_ids: list[int]) -> str:
        """The text that is certain now; ids behind a stop string are not consumed."""
        text = ""
        for token_id in token_ids:      # one by one, so that lumps make no difference
            if self.stop_reason is not None:
                break
            self.num_tokens += 1
            text += self._checked(self._decoder.push(token_id))
        return text

    def finish(self) -> str:
        """What was held back."""
        if self.stop_reason is not None:
            return ""
        text = self._checked(self._decoder.flush())
        return text if self.stop_reason is not None else text + self._stops.release()

    def _checked(self, piece: str) -> str:
        if not self._stops.any:
            return piece
        text, self.stop_reason = self._stops.push(piece, live=self.num_tokens > self._min_tokens)
        return text


class _Decoder:
    """Ids to text: what the decoding of a short window gains with each id.

    The window starts with tokens whose text has been given out, since a decoder may treat the
    first word of what it gets otherwise, and a character may lie in several tokens.  There are
    two kinds of decoders: one makes ``INCOMPLETE`` of the half character alone, the other of
    all characters in bytes before it too, until it is whole.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_tail: list[int], skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._window: list[int] = []
        self._given = ""                           # the beginning of the window's text, given out or the prompt's
        self._num_half = 0                         # tokens since the text last ended in a whole character
        for count in CONTEXT_TOKENS:
            self._window = prompt_tail[-count:]
            self._given = self._decode(self._window)
            if not self._given.startswith(INCOMPLETE):
                break

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        certain = text.rstrip(INCOMPLETE)
        self._num_half = 0 if certain == text else self._num_half + 1
        if self._num_half > MAX_HALF_BYTES:        # no beginning of a character is so long
            certain = text[:max(len(certain), len(text) - MAX_HALF_BYTES)]
        new = self._gain(text, certain)
        if len(self._window) > MAX_WINDOW_TOKENS and not 0 < self._num_half <= MAX_HALF_BYTES:
            self._shorten(text)
        return new

    def flush(self) -> str:
        text = self._decode(self._window)
        return text[len(self._given):] if text.startswith(self._given) else INCOMPLETE * self._num_half

    def _gain(self, text: str, certain: str) -> str:
        if not text.startswith(self._given):
            if self._given.startswith(certain):    # taken back until the half character is whole
                return ""
            self._given = os.path.commonprefix([self._given, text])   # the prompt's end has become whole
        new = certain[len(self._given):]
        self._given += new
        return new

    def _shorten(self, text: str) -> None:
        """Forget the window's beginning, up to where a character begins."""
        num_held = len(text) - len(self._given)
        for count in CONTEXT_TOKENS:
            rest = self._decode(self._window[-count:])
            if len(rest) > num_held and text.endswith(rest):
                self._window, self._given = self._window[-count:], rest[:len(rest) - num_held]
                return

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip)


class _StopStrings:
    """Holds back what may become a stop string, and cuts at the first that does."""

    def __init__(self, stops: list[str], include: bool) -> None:
        self._stops, self._include = stops, include
        self._held = ""
        self._dead = 0               # characters of _held in which no stop string may end (min_tokens)

    @property
    def any(self) -> bool:
        return bool(self._stops)

    def push(self, piece: str, live: bool) -> tuple[str, str | None]:
        """(text that is certain, the stop string found)."""
        self._held += piece
        if not live:
            self._dead = len(self._held)
        found = min(((at, stop) for stop in self._stops if (at := self._find(stop)) >= 0),
                    key=lambda pair: pair[0], default=None)
        if found is not None:
            at, stop = found
            return self._held[:at + len(stop) * self._include], stop
        return self._let_go(self._certain()), None

    def release(self) -> str:
        return self._let_go(len(self._held))

    def _find(self, stop: str) -> int:
        """The first place where ``stop`` ends in live text, or -1."""
        return self._held.find(stop, max(0, self._dead - len(stop) + 1))

    def _certain(self) -> int:
        """Characters before the longest end of the text that a stop string begins with."""
        longest = max(map(len, self._stops)) - 1
        for start in range(max(0, len(self._held) - longest), len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stops):
                return start
        return len(self._held)

    def _let_go(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self._dead = max(0, self._dead - count)
        return text
