"""Stand-ins for the frontend's neighbours: a link, a core, a detokenizer, a tokenizer."""

from __future__ import annotations

import numpy as np

from protocol.codec import i32_bytes, i32_column
from protocol.messages import EngineReady, Finish, Generate, Outputs, OutputKind, to_core, to_frontend
from protocol.sampling_params import SamplingParams, TokenParams, WireParams, resolve, to_wire
from protocol.transport import Sent

EOS = 0
VOCAB = 128


def text_of(token: int) -> str:
    """Token 1 is "a", 2 is "b", …"""
    return chr(96 + token) if token else "<eos>"


class FakeDetokenizer:
    """One letter a token; stop strings cut exactly, their beginnings held back."""

    def __init__(self, prompt_ids: bytes, wire: WireParams, min_tokens: int = 0) -> None:
        self.stop, self.keep = wire.stop, wire.include_stop_str_in_output
        self.stop_reason, self.num_tokens, self._held = None, 0, ""

    def push(self, token_ids: list[int]) -> str:
        out = ""
        for token in token_ids:
            self.num_tokens += 1
            self._held += text_of(token)
            for stop in self.stop:
                if stop in self._held:
                    end = self._held.index(stop) + (len(stop) if self.keep else 0)
                    self.stop_reason = stop
                    return out + self._held[:end]
            hold = max((n for stop in self.stop for n in range(len(stop)) if self._held.endswith(stop[:n])), default=0)
            out += self._held[:len(self._held) - hold]
            self._held = self._held[len(self._held) - hold:]
        return out

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


class FakeTokenizer:
    """Letters to 1 … 26."""

    eos_token_ids = (EOS,)
    generation_defaults: dict = {}
    token_text = staticmethod(text_of)

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 96 for c in text if c.isalpha()]

    def bad_words_ids(self, words: list[str]) -> list[list[int]]:
        return [self.encode(word) for word in words]


class FakeLink:
    """Frames that the frontend sent; frames for it to receive; a queue that may be full."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.incoming: list[bytes] = []
        self.full = False

    def send(self, frame: bytes) -> Sent:
        if self.full:
            return Sent.BUSY
        self.sent.append(frame)
        return Sent.OK

    def receive(self, limit: int = 64) -> list[bytes]:
        taken, self.incoming = self.incoming[:limit], self.incoming[limit:]
        return taken

    def messages(self) -> list:
        """What was sent so far, decoded; forgets it."""
        taken, self.sent = self.sent, []
        return [to_core.decode(frame) for frame in taken]

    def say(self, message: object) -> None:
        self.incoming.append(to_frontend.encode(message))


class RecordingCore:
    """The ledger's wishes."""

    def __init__(self) -> None:
        self.added: list[tuple] = []
        self.aborted: list[tuple] = []

    def add(self, request, child) -> None:
        self.added.append((request, child))

    def abort(self, request, child) -> None:
        self.aborted.append((request.key, None if child is None else child.index))


class Mailbox:
    """Where a ledger's messages to clients land; a client may be busy or gone."""

    def __init__(self) -> None:
        self.messages: list[tuple[bytes, object]] = []
        self.busy: set[bytes] = set()
        self.gone: set[bytes] = set()
        self.room: int | None = None      # messages until everybody is busy

    def __call__(self, client: bytes, message: object) -> Sent:
        if client in self.gone:
            return Sent.GONE
        if client in self.busy or self.room == 0:
            return Sent.BUSY
        if self.room is not None:
            self.room -= 1
        self.messages.append((client, message))
        return Sent.OK

    def take(self, kind: type | None = None) -> list:
        taken, self.messages = self.messages, []
        return [m for _, m in taken if kind is None or isinstance(m, kind)]


def generate(key: int = 1, *, text: str | None = "hello", output_kind: OutputKind = OutputKind.DELTA,
             token_ids: list[int] | None = None, **params) -> Generate:
    ids = None if token_ids is None else i32_bytes(token_ids)
    return Generate(bytes([key]) * 16, None if ids is not None else text, ids, None,
                    to_wire(SamplingParams(**params)), output_kind=output_kind)


def resolved(message: Generate, prompt_len: int = 5) -> TokenParams:
    return resolve(message.params, vocab_size=VOCAB, prompt_len=prompt_len, max_model_len=10_000,
                   eos_token_ids=[EOS])


def outputs(seq: int, *rows: tuple, **columns) -> Outputs:
    """Rows of (stream, offset, token ids[, finish[, stop token]])."""
    full = [(*row, *(Finish.NONE, -1)[len(row) - 3:]) for row in rows]
    return Outputs(
        seq, i32_bytes([r[0] for r in full]), i32_bytes([r[1] for r in full]),
        i32_bytes([len(r[2]) for r in full]), i32_bytes([t for r in full for t in r[2]]),
        bytes(r[3] for r in full), i32_bytes([r[4] for r in full]), **columns)


def ready(seq: int = 1) -> EngineReady:
    return EngineReady(seq, 1, 1, 10_000, 100, 32, VOCAB, i32_bytes([EOS]), "fingerprint")


def ids(data: bytes) -> list[int]:
    return i32_column(data).tolist()


def rows(tokens: list[int], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logprob columns in which every number tells where it belongs."""
    columns = np.array([[t, *range(1, width)] for t in tokens], "<i4").reshape(len(tokens), width)
    values = np.array([[-t / 8 - c for c in range(width)] for t in tokens], "<f4").reshape(len(tokens), width)
    return columns, values, np.array([t % 7 + 1 for t in tokens], "<i4")
