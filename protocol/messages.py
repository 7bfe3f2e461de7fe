"""The wire between SDK, frontend and core, and down the pipe from launch.py.

Owned jointly by ``frontend`` and ``core_proc``.  A *stream* is an int that a frontend
gives to one child request for as long as one channel (frontend incarnation × core
incarnation) lives.  Each message between frontend and core carries ``channel_seq``,
rising by one per direction.  New fields are appended last; columns of features that do
not exist yet are None.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec
from msgspec import Meta

from protocol.codec import MAX_STREAM_INTERVAL_TOKENS, Codec
from protocol.sampling_params import MAX_N, TokenParams, WireParams
from protocol.steps import Count, Hello, LogprobRows, Seed, Serial

Key = Annotated[bytes, Meta(min_length=16, max_length=16)]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
StreamInterval = Annotated[int, Meta(ge=1, le=MAX_STREAM_INTERVAL_TOKENS)]


class Finish(enum.IntEnum):
    """Why a stream ended; NONE while it goes on."""

    NONE = 0
    STOP = 1            # eos, stop id or stop string
    LENGTH = 2          # max_tokens or max_model_len
    ABORT = 3           # its client asked for it, or left
    ROW_ERROR = 4       # its logits were not finite, or no token was allowed
    MEMORY = 5          # did not fit even alone with one token
    CONVICTED = 6       # it failed the worker alone in a step, three times
    ENGINE_LOST = 7     # core or worker died
    SUPERSEDED = 8      # a newer attach owns the stream
    SHUTDOWN = 9        # the engine is stopping


# What a client sees as an error rather than as a finish_reason.
ERROR_MESSAGES = {
    Finish.ROW_ERROR: "the model gave no finite logits, or no token was allowed",
    Finish.MEMORY: "the request does not fit into memory even alone",
    Finish.CONVICTED: "the request made the worker fail three times while it ran alone",
    Finish.ENGINE_LOST: "the engine lost its core or worker process",
    Finish.SUPERSEDED: "a newer attach owns this stream",
    Finish.SHUTDOWN: "the engine is shutting down",
}


class OutputKind(enum.IntEnum):
    """When tokens cross the wire: as they come, or once at the end."""

    DELTA = 0
    FINAL = 1


class EventKind(enum.IntEnum):
    """Moments of a stream's life, for metrics."""

    ADMITTED = 1
    PREEMPTED = 2
    FIRST_TOKEN = 3


# --- frontend → core -------------------------------------------------------------------


class Add(msgspec.Struct, tag=10, frozen=True, array_like=True, gc=False):
    """One child request.  ``output_ids`` is a forced prefix of its output (a resumed stream)."""

    channel_seq: Serial
    key: Key
    stream: Count
    child: Count
    attempt: Count
    attach_no: Count
    resubmitted: bool
    arrival_ns: Serial               # time.time_ns() at the frontend or client
    prompt_ids: bytes                # i32[n]
    output_ids: bytes                # i32[m]
    params: TokenParams
    seed: Seed
    priority: Priority               # lower runs first
    client: bytes
    request_hash: bytes              # of the client's raw request
    output_kind: OutputKind = OutputKind.DELTA
    stream_interval: StreamInterval = 1   # tokens
    deadline_ns: Serial | None = None
    tenant: str | None = None
    lora_id: int | None = None
    grammar: bytes | None = None
    cache_salt: bytes | None = None
    fingerprint: str | None = None


class Abort(msgspec.Struct, tag=11, frozen=True, array_like=True, gc=False):
    """End child ``child`` of ``key`` (None: all).  Ignored unless it carries the newest attach."""

    channel_seq: Serial
    key: Key
    child: Count | None
    fe_epoch: Serial
    attach_no: Count


class ResumeDone(msgspec.Struct, tag=12, frozen=True, array_like=True, gc=False):
    """This frontend has resubmitted all that it had."""

    channel_seq: Serial


class Sync(msgspec.Struct, tag=13, frozen=True, array_like=True, gc=False):
    """Both ways, after a gap: what the sender has of each stream."""

    channel_seq: Serial
    have: bytes                      # i32[n, 2] (stream, tokens)
    received_seq: Serial             # what came later is under way, not lost


class Heartbeat(msgspec.Struct, tag=14, frozen=True, array_like=True, gc=False):
    """Both ways, 1 s when idle: the last channel_seq sent (this one included) and received."""

    channel_seq: Serial
    sent_seq: Serial
    received_seq: Serial


# --- core → frontend -------------------------------------------------------------------


class EngineReady(msgspec.Struct, tag=20, frozen=True, array_like=True, gc=False):
    """After each worker handshake; before it a frontend has nobody to send to."""

    channel_seq: Serial
    epoch: Serial
    gen: Serial
    max_model_len: Count             # tokens
    num_blocks: Count
    block_size: Count                # tokens
    vocab_size: Count
    eos_token_ids: bytes             # i32[n]
    numerics_fingerprint: str
    bit_exact: bool = False


class Accepted(msgspec.Struct, tag=21, frozen=True, array_like=True, gc=False):
    channel_seq: Serial
    stream: Count


class Rejected(msgspec.Struct, tag=22, frozen=True, array_like=True, gc=False):
    channel_seq: Serial
    stream: Count
    code: str
    field: str
    message: str


class StreamPromptLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Prompt logprobs of some streams; ``start`` is the absolute position of the first row."""

    stream: bytes                    # i32[p]
    start: bytes                     # i32[p], at least 1
    count: bytes                     # i32[p]
    width: Count
    ids: bytes                       # i32[sum(count), width]; column 0 is the token itself; -1 fills
    values: bytes                    # f32[sum(count), width]
    ranks: bytes | None = None       # i32[sum(count)]


class Outputs(msgspec.Struct, tag=23, frozen=True, array_like=True, gc=False):
    """Columns over streams: the tokens from ``offset`` on, and how it ended."""

    channel_seq: Serial
    stream: bytes                    # i32[n]
    offset: bytes                    # i32[n] output tokens before this message
    count: bytes                     # i32[n] output tokens in this message
    token_ids: bytes                 # i32[sum(count)]
    finish: bytes                    # u8[n] Finish
    stop_token: bytes                # i32[n] the eos or stop id that ended it (also in token_ids), else -1
    logprobs: LogprobRows | None = None   # rows as token_ids; width of the widest stream, -1 fills
    prompt_logprobs: StreamPromptLogprobs | None = None
    cached_tokens: bytes | None = None    # i32[n] prompt tokens taken from the prefix cache, -1: unknown yet
    events: list[tuple[int, EventKind, int]] | None = None   # (stream, kind, time_ns)


to_core = Codec(Hello, Add, Abort, ResumeDone, Sync, Heartbeat)
to_frontend = Codec(Hello, EngineReady, Accepted, Rejected, Outputs, Sync, Heartbeat)


# --- SDK → frontend --------------------------------------------------------------------


class ChatMessage(msgspec.Struct, frozen=True, array_like=True, gc=False):
    role: str
    content: str


class Generate(msgspec.Struct, tag=30, frozen=True, array_like=True, gc=False):
    """Exactly one of ``text``, ``token_ids`` and ``messages`` is given."""

    key: Key
    text: str | None
    token_ids: bytes | None          # i32[n]
    messages: list[ChatMessage] | None
    params: WireParams
    priority: Priority = 0
    output_kind: OutputKind = OutputKind.DELTA
    stream_interval: StreamInterval = 1
    attach_no: Count = 0
    have_tokens: list[bytes] | None = None   # per child: i32[m] ids already held
    have_chars: list[int] | None = None      # per child: characters already held
    request_hash: bytes = b""
    arrival_ns: Serial | None = None
    seed: Seed | None = None
    deadline_ns: Serial | None = None
    cache_salt: bytes | None = None
    tenant: str | None = None
    lora_id: int | None = None
    grammar: bytes | None = None


class AbortStream(msgspec.Struct, tag=31, frozen=True, array_like=True, gc=False):
    key: Key
    attach_no: Count


class Connect(msgspec.Struct, tag=32, frozen=True, array_like=True, gc=False):
    """First message of a client; answered by Welcome once the engine is ready."""

    protocol_version: int


# --- frontend → SDK --------------------------------------------------------------------


class Welcome(msgspec.Struct, tag=40, frozen=True, array_like=True, gc=False):
    protocol_version: int
    model: str
    max_model_len: Count
    vocab_size: Count
    has_chat_template: bool
    numerics_fingerprint: str


class AcceptedStream(msgspec.Struct, tag=41, frozen=True, array_like=True, gc=False):
    key: Key
    prompt_token_ids: bytes          # i32[n]
    seed: Seed
    params: TokenParams
    arrival_ns: Serial
    fingerprint: str


class Error(msgspec.Struct, tag=42, frozen=True, array_like=True, gc=False):
    """``key`` None: the frame itself was bad.  ``index`` None: the whole request."""

    key: Key | None
    index: Annotated[int, Meta(ge=0, lt=MAX_N)] | None
    code: str
    field: str
    message: str


class Usage(msgspec.Struct, frozen=True, array_like=True, gc=False):
    prompt_tokens: Count
    completion_tokens: Count
    cached_tokens: Count


class StreamMetrics(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Times in seconds; moments are time.time()."""

    arrival_time_s: float
    queue_time_s: float | None = None
    time_to_first_token_s: float | None = None
    finished_time_s: float | None = None
    num_preemptions: int = 0


class Delta(msgspec.Struct, tag=43, frozen=True, array_like=True, gc=False):
    """What one child gained: tokens from ``token_offset``, text from ``char_offset``."""

    key: Key
    index: Count
    token_offset: Count
    token_ids: bytes                 # i32[n]
    char_offset: Count
    text: str
    logprobs: LogprobRows | None = None          # rows as token_ids
    prompt_logprobs: LogprobRows | None = None   # the next rows, from prompt position 1 on; child 0 only, all before its last delta
    finish_reason: str | None = None             # "stop" | "length" | "abort"
    stop_reason: int | str | None = None         # stop id or stop string; None for EOS
    usage: Usage | None = None                   # with the last delta
    metrics: StreamMetrics | None = None         # with the last delta
    logprob_texts: list[str] | None = None         # one per entry of logprobs.ids, row by row
    prompt_logprob_texts: list[str] | None = None  # one per entry of prompt_logprobs.ids


class Ping(msgspec.Struct, tag=44, frozen=True, array_like=True, gc=False):
    """To clients with open streams once a second; one that is gone is noticed by it."""


from_sdk = Codec(Connect, Generate, AbortStream)
to_sdk = Codec(Welcome, AcceptedStream, Error, Delta, Ping)


# --- launch.py → child, one pipe each, frames of 4 bytes length + message ----------------


class Drain(msgspec.Struct, tag=50, frozen=True, array_like=True, gc=False):
    """Stop within ``grace_s`` seconds."""

    grace_s: float


class PeerDied(msgspec.Struct, tag=51, frozen=True, array_like=True, gc=False):
    role: str
    routing_id: bytes


class Resume(msgspec.Struct, tag=52, frozen=True, array_like=True, gc=False):
    """The routing ids to greet, and the keys under suspicion."""

    routing_ids: list[bytes]
    suspects: list[bytes]


from_launch = Codec(Drain, PeerDied, Resume)
