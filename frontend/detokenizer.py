"""Token ids to text as they come, and the stop strings in it.

One per child stream, owned by the ledger.  Text is a pure function of the prompt's tail,
the output ids and the parameters: ids pushed one by one, in lumps, or all again after a
resumption give the same text.  Half a character is never given out; ``finish`` flushes it.
"""

from __future__ import annotations

from frontend.tokenizer import Tokenizer
from protocol.codec import i32_column
from protocol.sampling_params import WireParams

PROMPT_TAIL_TOKENS = 5       # enough for decoders that join words by what stands before
INCOMPLETE = "\ufffd"        # what a decoder makes of bytes that are no whole character


class Detokenizer:
    """``push`` ids, take text; ``stop_reason`` is set when a stop string has ended it."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: bytes, params: WireParams, min_tokens: int = 0) -> None:
        self.stop_reason: str | None = None      # the stop string that was found
        self.num_tokens = 0                      # consumed, the one that completed the stop string included
        self._decoder = _Decoder(tokenizer, i32_column(prompt_ids)[-PROMPT_TAIL_TOKENS:].tolist(),
                                 params.skip_special_tokens)
        self._stops = _StopStrings(params.stop, params.include_stop_str_in_output)
        self._min_tokens = min_tokens

    def push(self, token_ids: list[int]) -> str:
        """The text that is certain now; ids behind a stop string are not consumed."""
        if not self._stops.any:
            self.num_tokens += len(token_ids)
            return self._decoder.push(token_ids)
        text = ""
        for token_id in token_ids:
            if self.stop_reason is not None:
                break
            self.num_tokens += 1
            text += self._checked(self._decoder.push([token_id]))
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
    """Ids to text: the difference of two decodings of a short window.

    ``_ids[:_read]`` has been given out and is kept, since a decoder may treat the first word
    of what it gets otherwise; it ends between whole characters.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_tail: list[int], skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids = prompt_tail
        self._read = len(prompt_tail)
        self._beyond = 0             # characters given out of the tokens behind _read

    def push(self, token_ids: list[int]) -> str:
        self._ids.extend(token_ids)
        return self._new_text(flushing=False)

    def flush(self) -> str:
        return self._new_text(flushing=True)

    def _new_text(self, flushing: bool) -> str:
        known = self._decode(self._ids[:self._read]).rstrip(INCOMPLETE)    # a prompt may end in half a character
        text = self._decode(self._ids)
        certain = text if flushing else text.rstrip(INCOMPLETE)
        new = certain[len(known) + self._beyond:]
        if len(certain) == len(text) > len(known):
            self._ids = self._ids[self._read:]
            self._read, self._beyond = len(self._ids), 0
        else:
            self._beyond += len(new)
        return new

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
