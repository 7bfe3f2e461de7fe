"""A frontend that believes nothing: every stream's tokens in order, its end exactly once."""

from __future__ import annotations

import random
from typing import Any

from protocol.codec import i32_bytes, i32_column
from protocol.messages import Abort, Accepted, Add, Finish, Heartbeat, OutputKind, Outputs, Rejected, Sync, to_core, to_frontend
from protocol.sampling_params import TokenParams
from simulation.reference import Wish


class FakeFrontend:
    """Encodes what it says and decodes what it hears; loses a message now and then."""

    def __init__(self, rng: random.Random, loss_rate: float) -> None:
        self.rng, self.loss_rate = rng, loss_rate
        self.tokens: dict[int, list[int]] = {}       # stream → output so far
        self.finish: dict[int, Finish] = {}
        self.rejected: dict[int, str] = {}
        self.accepted: set[int] = set()
        self.wishes: dict[int, Wish] = {}
        self._sent_seq = self._received_seq = 0

    def add(self, wish: Wish, now_ns: int) -> bytes:
        self.wishes[wish.stream] = wish
        self.tokens[wish.stream] = list(wish.forced)
        return self._add(wish, now_ns)

    def _add(self, wish: Wish, now_ns: int) -> bytes:
        params = TokenParams(max_tokens=wish.max_tokens, min_tokens=wish.min_tokens, stop_token_ids=i32_bytes(sorted(wish.stop_ids)))
        return self._say(
            Add, key=wish.key, stream=wish.stream, child=wish.child, attempt=0, attach_no=0, resubmitted=False, arrival_ns=now_ns,
            prompt_ids=i32_bytes(wish.prompt), output_ids=i32_bytes(self.tokens[wish.stream]), params=params, seed=wish.seed,
            priority=wish.priority, client=b"c", request_hash=b"",
            output_kind=OutputKind.FINAL if wish.final else OutputKind.DELTA, stream_interval=wish.interval)

    def abort(self, wish: Wish) -> bytes:
        self.finish[wish.stream] = Finish.ABORT
        return self._say(Abort, key=wish.key, child=wish.child, fe_epoch=1, attach_no=0)

    def heartbeat(self) -> bytes:
        return self._say(Heartbeat, sent_seq=self._sent_seq + 1, received_seq=self._received_seq)

    def receive(self, frame: bytes, now_ns: int) -> list[bytes]:
        """What it answers: a Sync after a gap, and again what the core has never heard of."""
        message = to_frontend.decode(frame)
        if self._received_seq and self.rng.random() < self.loss_rate:
            return []
        gap = self._received_seq and message.channel_seq > self._received_seq + 1
        self._received_seq = max(self._received_seq, message.channel_seq)
        complete = True
        match message:
            case Accepted(stream=stream):
                self.accepted.add(stream)
            case Rejected(stream=stream, message=text):
                self.rejected[stream] = text
            case Outputs():
                complete = self._outputs(message)
            case Sync(have=have):
                known = set(i32_column(have)[::2].tolist())
                return [self._add(self.wishes[stream], now_ns) for stream in self._open() if stream not in known]
        if gap or not complete:
            have = [v for stream in self._open() for v in (stream, len(self.tokens[stream]))]
            return [self._say(Sync, have=i32_bytes(have))]
        return []

    def _open(self) -> list[int]:
        return [stream for stream in self.wishes if stream not in self.finish and stream not in self.rejected]

    def _outputs(self, message: Outputs) -> bool:
        at, complete = 0, True
        streams, offsets, counts = (i32_column(c).tolist() for c in (message.stream, message.offset, message.count))
        ids = i32_column(message.token_ids, sum(counts)).tolist()
        for stream, offset, count, finish in zip(streams, offsets, counts, message.finish, strict=True):
            new, at = ids[at:at + count], at + count
            if self.finish.get(stream) is Finish.ABORT:
                continue
            known = self.tokens[stream]
            if offset > len(known):
                complete = False
                continue
            again = known[offset:offset + count]
            assert again == new[:len(again)], f"stream {stream}: tokens changed"
            known += new[len(again):]
            if finish:
                assert self.finish.setdefault(stream, Finish(finish)) == finish, f"stream {stream} ended twice"
            else:
                assert stream not in self.finish or not new[len(again):], f"stream {stream} goes on after its end"
        return complete

    def _say(self, kind: type, **fields: Any) -> bytes:
        self._sent_seq += 1
        return to_core.encode(kind(channel_seq=self._sent_seq, **fields))
