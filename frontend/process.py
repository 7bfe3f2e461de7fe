"""The frontend process: clients on one socket, the core on another, one loop.

Started by launch.py (``python -P -m frontend.process``).  The loop only translates between
sockets and the parts that decide: ``tokenize_queue`` and ``intake`` (check, tokenize),
``session`` (the ledger), ``engine_client`` (the channel to the core).  Must stay true: it
sleeps when nothing is due; a turn takes at most 64 messages from each side and about 1 ms
of tokenizing.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import logging
import math
import re
import sys
import time
from pathlib import Path

import msgspec
import zmq

from frontend.chat_template import ChatTemplate
from frontend.detokenizer import Detokenizer
from frontend.engine_client import EngineClient
from frontend.intake import Intake, Limits, limits_of
from frontend.session import MakeDetokenizer, Session, derived_seed
from frontend.tokenize_queue import Arrival, Result, TokenizeQueue
from frontend.tokenizer import Tokenizer
from protocol.child import ChildContext, start_child
from protocol.codec import PROTOCOL_VERSION, Reject, Unsupported
from protocol.messages import (
    AbortStream, Connect, Drain, EngineReady, Finish, Generate, PeerDied, Ping, Welcome, from_sdk, to_sdk,
)
from protocol.progress import State
from protocol.sampling_params import BadRequest, WireParams
from protocol.transport import Link, Peers, Sent, new_context

TURN_MESSAGES = 64           # most messages taken from one socket in one turn
TICK_S = 1.0                 # Ping, Heartbeat, progress page
RETRY_S = 0.05               # a full queue is offered its frames again

log = logging.getLogger(__name__)


class FrontendProcess:
    """Sockets and timers; decisions are made elsewhere."""

    def __init__(self, context: ChildContext, intake: Intake, make_detokenizer: MakeDetokenizer) -> None:
        self.context, self.page, self.intake = context, context.page, intake
        self.limits: Limits | None = None             # None until the engine is ready
        self.greeted: EngineReady | None = None       # the one that ``limits`` were taken from
        self.queue = TokenizeQueue(lambda generate: self.intake.prepare(generate, self.limits))
        zmq_context = new_context()
        self.clients = Peers(zmq_context, context.run_dir.client_socket)
        self.link = Link(zmq_context, context.run_dir.core_socket, context.routing_id)
        self.core = EngineClient(self.link, context.routing_id, context.epoch)
        self.session = Session(
            self.core, make_detokenizer, functools.lru_cache(65_536)(intake.tokenizer.token_text),
            lambda: self.core.ready.numerics_fingerprint, context.config.run.stream_interval)
        self.connecting: set[bytes] = set()           # clients that wait for Welcome
        self.last_arrival_ns = 0
        self.refuse_as: Finish | None = None          # why no new request is taken
        self.drain_until_s: float | None = None       # monotonic
        self.next_tick_s = time.monotonic() + TICK_S

    # --- the loop --------------------------------------------------------------------------

    def run(self) -> int:
        """The exit code, once the parent is gone or everything is drained."""
        poller = zmq.Poller()
        for source in (self.clients.socket, self.link.socket, self.context.lifeline.fd, self.queue.wake_fd):
            poller.register(source, zmq.POLLIN)
        while True:
            poller.poll(math.ceil(1000 * self._sleep_s()))     # ms; rounded down it would spin
            if not self._control():
                return 0
            self._from_clients()
            self.core.receive(self.session, TURN_MESSAGES)
            self._greet_engine()
            for arrival, result in self.queue.turn():
                self._open(arrival, result)
            now_s = time.monotonic()
            if now_s >= self.next_tick_s or self.core.unsent:
                self._tick(now_s)
            self._flush()
            if self.drain_until_s is not None and self._drained(now_s):
                return 0

    def close(self) -> None:
        """Remove the socket file; what is queued to clients still goes out."""
        self.queue.close()
        self.clients.close()
        self.link.close()

    def _sleep_s(self) -> float:
        """Until the next timer; 0 while there is work that no socket announces."""
        if self.queue.due:
            return 0.0
        until_s = self.next_tick_s
        if self.drain_until_s is not None:
            until_s = min(until_s, self.drain_until_s)
        sleep_s = until_s - time.monotonic()
        if self.session.unsent or self.core.unsent:
            sleep_s = min(sleep_s, RETRY_S)
        return max(0.0, sleep_s)

    def _tick(self, now_s: float) -> None:
        self.core.tick(now_s)
        if now_s < self.next_tick_s:
            return
        self.next_tick_s = now_s + TICK_S
        for client in self.session.clients():
            if self._send(client, Ping()) is Sent.GONE:
                self._gone(client)
        self.page.add("ticks")
        self.page.set("streams", self.session.num_open)

    def _flush(self) -> None:
        for client in self.session.flush(self._send, time.time_ns()):
            self._gone(client)

    def _send(self, client: bytes, message: msgspec.Struct) -> Sent:
        return self.clients.send(client, to_sdk.encode(message))

    # --- launch.py and the core --------------------------------------------------------------

    def _control(self) -> bool:
        """False if the parent is gone."""
        lifeline = self.context.lifeline
        for message in lifeline.receive():
            if isinstance(message, Drain):
                self._refuse_from_now(Finish.SHUTDOWN)
                self.drain_until_s = time.monotonic() + message.grace_s
                self.page.set("state", State.DRAINING)
            elif isinstance(message, PeerDied):
                log.warning("the %s process died", message.role)
                self._refuse_from_now(Finish.ENGINE_LOST)
                self.session.fail_all(Finish.ENGINE_LOST)
        return not lifeline.parent_gone

    def _refuse_from_now(self, finish: Finish) -> None:
        self.refuse_as = finish
        for arrival in self.queue.cancel_all():
            self._refuse(arrival.client, arrival.generate.key)
        for client in self.connecting:
            self._refuse(client, None)
        self.connecting.clear()

    def _drained(self, now_s: float) -> bool:
        """All is said, or the time is up: then what is still open ends by SHUTDOWN."""
        if now_s >= self.drain_until_s:
            self.session.fail_all(Finish.SHUTDOWN)
            self._flush()
            return True
        return self.session.num_open == 0 and not self.session.unsent

    def _greet_engine(self) -> None:
        """The first EngineReady opens the doors; a later one may change the limits."""
        ready = self.core.ready
        if ready is self.greeted:
            return
        first, self.greeted = self.greeted is None, ready
        self.limits = limits_of(ready, self.intake.tokenizer.eos_token_ids)
        self.page.set("vocab_size", ready.vocab_size)
        self.page.set("max_model_len", ready.max_model_len)
        if first:
            self.page.set("state", State.READY)
            for client in self.connecting:
                self._welcome(client)
            self.connecting.clear()
            gc.collect()
            gc.freeze()

    # --- clients ---------------------------------------------------------------------------

    def _from_clients(self) -> None:
        for client, frame in self.clients.receive(TURN_MESSAGES):
            message = from_sdk.decode(frame)
            match message:
                case Generate():
                    self._generate(client, message, frame)
                case AbortStream(key=key, attach_no=attach_no):
                    self.session.abort(client, key, attach_no)
                    for arrival in self.queue.cancel(client, key):
                        self.session.refuse(client, arrival.generate.key, "abort", "", "aborted by its client")
                case Connect():
                    self._connect(client, message)
                case Reject(reason=reason):
                    key, field, text = explain_reject(frame, reason)
                    self.session.refuse(client, key, "bad_frame", field, text)
                case Unsupported(tag=tag):
                    self.session.refuse(client, None, "unsupported", "", f"no message has the tag {tag}")

    def _connect(self, client: bytes, message: Connect) -> None:
        if message.protocol_version != PROTOCOL_VERSION:
            self.session.refuse(client, None, "protocol_version", "protocol_version",
                                f"was {message.protocol_version}; this engine speaks {PROTOCOL_VERSION}")
        elif self.refuse_as is not None:
            self._refuse(client, None)
        elif self.limits is None:
            self.connecting.add(client)
        else:
            self._welcome(client)

    def _welcome(self, client: bytes) -> None:
        self._send(client, Welcome(
            PROTOCOL_VERSION, self.context.config.model_name, self.limits.max_model_len,
            self.limits.vocab_size, self.intake.template is not None, self.core.ready.numerics_fingerprint))

    def _generate(self, client: bytes, generate: Generate, frame: bytes) -> None:
        key = generate.key
        if self.refuse_as is not None or self.limits is None:
            self._refuse(client, key)
        elif self.session.is_open(client, key) or self.queue.holds(client, key):
            self.session.refuse(client, key, "conflict", "key", "is in use by an open request")
        else:
            self.last_arrival_ns = max(self.last_arrival_ns + 1, time.time_ns())
            request_hash = generate.request_hash or hashlib.blake2b(frame, digest_size=16).digest()
            self.queue.put(Arrival(client, generate, generate.arrival_ns or self.last_arrival_ns, request_hash))

    def _open(self, arrival: Arrival, result: Result) -> None:
        generate = arrival.generate
        if isinstance(result, BadRequest):
            self.session.refuse(arrival.client, generate.key, result.code, result.field, result.message)
            return
        prompt_ids, params = result
        seed = generate.seed
        if seed is None:
            seed = derived_seed(generate.key, self.context.config.model.seed)
        self.session.open(arrival.client, generate, prompt_ids, params, seed=seed,
                          arrival_ns=arrival.arrival_ns, request_hash=arrival.request_hash)

    def _refuse(self, client: bytes, key: bytes | None) -> None:
        """No request is taken now; say why."""
        code, text = "not_ready", "the engine is still starting"
        if self.refuse_as is not None:
            code, text = self.refuse_as.name.lower(), "the engine is stopping and takes no requests"
        self.session.refuse(client, key, code, "", text)

    def _gone(self, client: bytes) -> None:
        """It left without a word."""
        self.queue.cancel(client)
        if ended := self.session.drop_client(client):
            log.info("a client left; its %d open requests are aborted", ended)


def explain_reject(frame: bytes, reason: str) -> tuple[bytes | None, str, str]:
    """(key, field, message) of a frame that did not decode, as far as it can be read."""
    try:
        parts = msgspec.msgpack.decode(frame, type=list[msgspec.Raw])
        tag, key = msgspec.msgpack.decode(parts[0]), msgspec.msgpack.decode(parts[1], type=bytes)
    except (msgspec.DecodeError, IndexError, RecursionError):
        return None, "", reason
    field = ""
    found = re.search(r"`\$\[(\d+)\](?:\[(\d+)\])?", reason)
    if found and tag == Generate.__struct_config__.tag:
        field = _name(Generate, int(found[1]) - 1)      # element 0 is the tag
        if field == "params" and found[2] is not None:
            field = _name(WireParams, int(found[2]))
    return (key if len(key) == 16 else None), field, reason


def _name(struct: type[msgspec.Struct], index: int) -> str:
    names = struct.__struct_fields__
    return names[index] if 0 <= index < len(names) else ""


def load(context: ChildContext) -> FrontendProcess:
    """The frontend of the model that ``context`` names."""
    context.page.set("state", State.LOADING)
    model_dir = Path(context.config.model_dir)
    tokenizer = Tokenizer(model_dir)
    intake = Intake(tokenizer, ChatTemplate.load(model_dir, tokenizer), context.config)
    return FrontendProcess(context, intake, functools.partial(Detokenizer, tokenizer))


def main() -> int:
    context = start_child("frontend")
    try:
        frontend = load(context)
    except Exception as error:  # whatever it is, launch.py and the user must hear of it
        return context.failed(error)
    try:
        return frontend.run()
    finally:
        frontend.close()


if __name__ == "__main__":
    sys.exit(main())
