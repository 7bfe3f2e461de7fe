"""The ledger of a frontend: every open request of every client, what has come, what was sent.

Sans-I/O: ``process`` feeds it client requests (already checked by ``intake``) and core
events (already split by ``engine_client``), and lets it ``flush`` into a send function.
Must stay true: a client gets exactly one terminal event per request (the delta with the
usage, or an Error); nothing sent is sent again or taken back; what a full queue refused is
kept and offered again; a stream that ended here is never heard of again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec
import numpy as np

from frontend.streams import Child, Detokenizer, OpenRequest
from protocol.codec import i32_column
from protocol.messages import ERROR_MESSAGES, AcceptedStream, Error, EventKind, Finish, Generate
from protocol.sampling_params import TokenParams, WireParams
from protocol.transport import Sent

log = logging.getLogger(__name__)

Send = Callable[[bytes, object], Sent]     # (client, message)
MakeDetokenizer = Callable[[bytes, WireParams, int], Detokenizer]   # prompt ids, params, min_tokens


class CoreCommands(Protocol):
    """What the ledger asks of the core (``engine_client``)."""

    def add(self, request: OpenRequest, child: Child) -> None: ...
    def abort(self, request: OpenRequest, child: Child | None) -> None: ...


class StreamOutput(msgspec.Struct, gc=False):
    """One stream's part of an Outputs message."""

    stream: int
    offset: int                      # output tokens before these
    token_ids: list[int]
    finish: Finish
    stop_token: int                  # eos or stop id that ended it, else -1
    cached_tokens: int               # -1: unknown yet
    logprobs: tuple[np.ndarray, np.ndarray, np.ndarray] | None   # ids [n, w], values [n, w], ranks [n]


def mix_seed(seed: int, index: int) -> int:
    """The seed of child ``index``: child 0 keeps it, the others are spread over 64 bits."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + index.to_bytes(4, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def derived_seed(key: bytes, engine_seed: int | None) -> int:
    """The seed of a request that gives none: its key's, mixed with the engine's where there is one."""
    salt = b"" if engine_seed is None else engine_seed.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(key + salt, digest_size=8).digest(), "little")


def core_key(client: bytes, key: bytes) -> bytes:
    """Keys are the client's own affair; in the core they are 128 bits over client and key."""
    return hashlib.blake2b(bytes([len(client)]) + client + key, digest_size=16).digest()


class Session:
    """All open requests, by client key and by stream."""

    def __init__(self, core: CoreCommands, make_detokenizer: MakeDetokenizer,
                 text_of: Callable[[int], str], fingerprint: Callable[[], str],
                 stream_interval: int = 1) -> None:
        self._stream_interval = stream_interval      # tokens: the engine's own, clients may ask for more
        self._core, self._make_detokenizer = core, make_detokenizer
        self._text_of, self._fingerprint = text_of, fingerprint
        self._requests: dict[tuple[bytes, bytes], OpenRequest] = {}       # (client, key)
        self._streams: dict[int, tuple[OpenRequest, Child]] = {}          # those the core still feeds
        self._dirty: dict[OpenRequest, None] = {}                         # in order: something is due
        self._refusals: list[tuple[bytes, Error]] = []                    # not yet sent
        self._next_stream = 1

    # --- from clients --------------------------------------------------------------------

    def open(self, client: bytes, generate: Generate, prompt_ids: bytes, params: TokenParams,
             *, seed: int, arrival_ns: int, request_hash: bytes) -> OpenRequest:
        """Enter a checked request and add its n children to the core."""
        request = OpenRequest(
            client=client, key=generate.key, core_key=core_key(client, generate.key),
            attach_no=generate.attach_no, prompt_ids=prompt_ids, wire=generate.params, params=params,
            priority=generate.priority, output_kind=generate.output_kind,
            stream_interval=max(generate.stream_interval, self._stream_interval), cache_salt=generate.cache_salt,
            request_hash=request_hash, arrival_ns=arrival_ns)
        self._requests[client, generate.key] = request
        for index in range(generate.params.n):
            # The prompt's logprobs are the same for all children: child 0 asks for them.
            own = params if index == 0 else msgspec.structs.replace(params, prompt_logprobs=None)
            detokenizer = None
            if generate.params.detokenize:
                detokenizer = self._make_detokenizer(prompt_ids, generate.params, params.min_tokens)
            child = Child(index, self._next_stream, mix_seed(seed, index), own, detokenizer)
            self._next_stream += 1
            request.children.append(child)
            self._streams[child.stream] = (request, child)
            self._core.add(request, child)
        return request

    def is_open(self, client: bytes, key: bytes) -> bool:
        return (client, key) in self._requests

    def refuse(self, client: bytes, key: bytes | None, code: str, field: str, message: str) -> None:
        """A request that never opened: one Error to its client."""
        self._refusals.append((client, Error(key, None, code, field, message)))

    def abort(self, client: bytes, key: bytes, attach_no: int) -> None:
        """The client's wish; ignored unless it carries the newest attach."""
        request = self._requests.get((client, key))
        if request is None or request.ended or attach_no != request.attach_no:
            return
        self._abort_in_core(request)
        for child in request.children:
            if child.finish is Finish.NONE:
                child.end(Finish.ABORT)
        request.accepted = True
        self._dirty[request] = None

    def drop_client(self, client: bytes) -> int:
        """The client is gone: end its requests without a word; how many there were."""
        gone = [request for (owner, _), request in self._requests.items() if owner == client]
        for request in gone:
            if not request.ended:
                self._abort_in_core(request)
            self._forget(request)
        self._refusals = [entry for entry in self._refusals if entry[0] != client]
        return len(gone)

    # --- from the core ---------------------------------------------------------------------

    def accept(self, stream: int) -> None:
        request, _child = self._streams.get(stream, (None, None))
        if request is not None and not request.accepted:
            request.accepted = True
            self._dirty[request] = None

    def reject(self, stream: int, code: str, field: str, message: str) -> None:
        request, _child = self._streams.get(stream, (None, None))
        if request is not None:
            self._fail(request, (None, code, field, message))

    def output(self, out: StreamOutput) -> bool:
        """Tokens and end of one stream; False if something before them is missing."""
        entry = self._streams.get(out.stream)
        if entry is None:
            return True      # ended here already: its later tokens and its end concern nobody
        request, child = entry
        known = len(child.token_ids) - out.offset
        if known < 0 or (out.token_ids and child.index == 0 and request.lacks_prompt_rows):
            return False
        request.accepted = True
        new = out.token_ids[known:]
        if out.cached_tokens >= 0 and child.index == 0:
            request.cached_tokens = out.cached_tokens
        try:
            counted = child.push(new, out.stop_token, request.wire.include_stop_str_in_output)
        except Exception:      # of the tokenizer's library; no other stream may suffer
            log.exception("a stream could not be detokenized")
            self._fail(request, (child.index, "internal", "", "the output could not be detokenized"))
            return True
        if child.logprobs is not None and out.logprobs is not None and counted:
            child.logprobs.append(*(column[known:known + counted] for column in out.logprobs))
        if out.finish in ERROR_MESSAGES and child.finish is Finish.NONE:
            self._fail(request, (child.index, out.finish.name.lower(), "", ERROR_MESSAGES[out.finish]))
            return True
        if out.finish is not Finish.NONE and child.finish is Finish.NONE:
            eos = out.stop_token in i32_column(child.params.eos_token_ids)
            child.end(out.finish, out.stop_token if out.stop_token >= 0 and not eos else None)
        if child.finish is not Finish.NONE:
            del self._streams[child.stream]
            if out.finish is Finish.NONE:    # a stop string: the core does not know yet
                self._core.abort(request, child)
        if request.streams_text or child.finish is not Finish.NONE:
            self._dirty[request] = None
        return True

    def prompt_rows(self, stream: int, start: int, ids: np.ndarray, values: np.ndarray, ranks: np.ndarray) -> None:
        """Logprobs of prompt positions from ``start`` (at least 1); rows known already are skipped."""
        request, child = self._streams.get(stream, (None, None))
        if request is None or request.prompt_logprobs is None or child.index:
            return
        known = 1 + request.prompt_rows - start
        if 0 <= known < len(ids):
            request.prompt_logprobs.append(ids[known:], values[known:], ranks[known:])
            request.prompt_rows += len(ids) - known
            request.accepted = True
            self._dirty[request] = None

    def event(self, stream: int, kind: EventKind, time_ns: int) -> None:
        request, _child = self._streams.get(stream, (None, None))
        if request is None:
            return
        if kind is EventKind.ADMITTED and request.admitted_ns is None:
            request.admitted_ns = time_ns
        elif kind is EventKind.FIRST_TOKEN and request.first_token_ns is None:
            request.first_token_ns = time_ns
        elif kind is EventKind.PREEMPTED:
            request.num_preemptions += 1

    def fail_all(self, finish: Finish) -> None:
        """The engine is lost or stopping: one typed error to every open request."""
        for request in list(self._requests.values()):
            if not request.ended:
                self._fail(request, (None, finish.name.lower(), "", ERROR_MESSAGES[finish]))

    def streams(self) -> Iterator[tuple[int, int]]:
        """(stream, output tokens held) of every stream the core still feeds: for Sync."""
        return ((stream, len(child.token_ids)) for stream, (_request, child) in self._streams.items())

    def resubmit_unknown(self, known_to_core: set[int]) -> None:
        """The core missed messages: add again what it has never heard of."""
        for stream, (request, child) in list(self._streams.items()):
            if stream not in known_to_core:
                self._core.add(request, child)

    # --- to clients ------------------------------------------------------------------------

    def flush(self, send: Send, now_ns: int) -> set[bytes]:
        """Offer everything that is due; the clients that turned out to be gone."""
        busy: set[bytes] = set()
        gone: set[bytes] = set()
        refusals, self._refusals = self._refusals, []
        for client, error in refusals:
            outcome = Sent.BUSY if client in busy else send(client, error)
            if outcome is Sent.BUSY:
                busy.add(client)
                self._refusals.append((client, error))
        for request in list(self._dirty):
            if request.client in busy or request.client in gone:
                continue
            outcome = self._deliver(request, send, now_ns)
            if outcome is Sent.OK:
                del self._dirty[request]
                if request.closed:
                    self._forget(request)
            else:
                (busy if outcome is Sent.BUSY else gone).add(request.client)
        return gone

    @property
    def unsent(self) -> bool:
        """A full queue refused something: flush again soon."""
        return bool(self._dirty or self._refusals)

    @property
    def num_open(self) -> int:
        return len(self._requests)

    def clients(self) -> set[bytes]:
        """Clients with open requests."""
        return {client for client, _key in self._requests}

    # --- inside ----------------------------------------------------------------------------

    def _deliver(self, request: OpenRequest, send: Send, now_ns: int) -> Sent:
        if request.accepted and not request.accept_sent:
            outcome = send(request.client, AcceptedStream(
                request.key, request.prompt_ids, request.children[0].seed, request.params,
                request.arrival_ns, self._fingerprint()))
            if outcome is not Sent.OK:
                return outcome
            request.accept_sent = True
        for child in request.children:
            while (delta := request.next_delta(child, now_ns, self._text_of)) is not None:
                outcome = send(request.client, delta)
                if outcome is not Sent.OK:
                    return outcome
                request.mark_sent(child, delta)
        if request.error is not None:
            outcome = send(request.client, Error(request.key, *request.error))
            if outcome is not Sent.OK:
                return outcome
            request.closed = True
        return Sent.OK

    def _fail(self, request: OpenRequest, error: tuple[int | None, str, str, str]) -> None:
        """One child's error is its request's: the other children are ended."""
        self._abort_in_core(request)
        request.error = error
        self._dirty[request] = None

    def _abort_in_core(self, request: OpenRequest) -> None:
        """End what the core still feeds of ``request``."""
        fed = [child for child in request.children if self._streams.pop(child.stream, None) is not None]
        if fed:
            self._core.abort(request, None)

    def _forget(self, request: OpenRequest) -> None:
        self._requests.pop((request.client, request.key), None)
        self._dirty.pop(request, None)
        for child in request.children:
            self._streams.pop(child.stream, None)
