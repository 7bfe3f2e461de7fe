"""The worker process: loads the model, then answers each plan of the core with its result.

Started by launch.py.  One thread, one socket: frames are taken in order, plans run in order,
and between two of them it sleeps in poll.  torch is imported only after the environment it
reads has been set, and after the progress page says that loading has begun.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections import deque
from typing import TYPE_CHECKING

import zmq

from protocol.child import ChildContext, start_child
from protocol.codec import PROTOCOL_VERSION, Reject, Unsupported, i32_bytes, i32_column
from protocol.messages import Drain
from protocol.parent_death import die_with_parent
from protocol.progress import State
from protocol.steps import Hello, StepPlan, StepResult, WorkerReady, to_core, to_worker
from protocol.transport import Link, Sent, new_context

if TYPE_CHECKING:
    from gpu_worker.startup import LoadedWorker

logger = logging.getLogger(__name__)
TICK_MS = 1000           # an idle worker shows that it lives
RETRY_MS = 10            # until a full queue has room
PRIMITIVE_CACHE = "4096" # compiled oneDNN kernels: more than (batch sizes × weight shapes), or they are compiled anew


def main() -> int:
    """The process's exit code."""
    context = start_child("worker")
    die_with_parent()
    context.page.set("state", State.LOADING)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRIMITIVE_CACHE)
    try:
        return _serve(context, _load(context))
    except Exception as error:  # whatever it is, launch.py and the user must hear of it
        return context.failed(error)


def _serve(context: ChildContext, worker: LoadedWorker) -> int:
    zmq_context = new_context()
    link = Link(zmq_context, context.run_dir.worker_socket, context.routing_id)
    try:
        return Service(context, worker, link).run()
    finally:
        link.close()
        zmq_context.term()


def _load(context: ChildContext) -> LoadedWorker:
    from gpu_worker.startup import load_worker    # imports torch, which reads the environment

    worker, page = load_worker(context.config), context.page
    page.set_text("device", worker.device)
    page.set_text("dtype", worker.dtype)
    page.set_text("fingerprint", worker.numerics_fingerprint)
    page.set("num_threads", worker.num_threads)
    page.set("blocks", worker.num_blocks)
    page.set("max_model_len", worker.max_model_len)
    page.set("vocab_size", worker.runner.model.spec.vocab_size)
    gc.collect()
    gc.freeze()
    return worker


class Service:
    """The loop: frames in, plans run, results out."""

    def __init__(self, context: ChildContext, worker: LoadedWorker, link: Link) -> None:
        self._context, self._worker, self._link = context, worker, link
        self._page, self._epoch = context.page, context.epoch
        self._plans: deque[StepPlan] = deque()
        self._unsent: deque[bytes] = deque()
        self._exit_code: int | None = None

    def run(self) -> int:
        """Serve until the parent says Drain, or is gone."""
        poller = zmq.Poller()
        poller.register(self._link.socket, zmq.POLLIN)
        poller.register(self._context.lifeline.fd, zmq.POLLIN)
        self._send(Hello(PROTOCOL_VERSION, "worker", self._context.routing_id, self._epoch))
        self._page.set("state", State.READY)
        while self._exit_code is None:
            poller.poll(0 if self._plans else RETRY_MS if self._unsent else TICK_MS)
            self._page.add("ticks")
            self._hear_parent()
            for frame in self._link.receive():
                self._take(frame)
            self._flush()
            if self._plans and self._exit_code is None:
                self._run_plan(self._plans.popleft())
        return self._exit_code

    def _hear_parent(self) -> None:
        messages = self._context.lifeline.receive()
        if self._context.lifeline.parent_gone or any(isinstance(message, Drain) for message in messages):
            self._page.set("state", State.DRAINING)
            self._exit_code = 0

    def _take(self, frame: bytes) -> None:
        message = to_worker.decode(frame)
        match message:
            case StepPlan():
                if (message.epoch, message.gen) == (self._epoch, self._context.gen):
                    self._plans.append(message)
                else:
                    logger.info("dropped plan %d of epoch %d, gen %d", message.step_id, message.epoch, message.gen)
            case Hello():
                self._greet(message)
            case Reject() | Unsupported():
                logger.warning("dropped a frame from the core: %s", message)

    def _greet(self, hello: Hello) -> None:
        """Answer the core; a new one finds a worker that remembers no row."""
        if hello.protocol_version != PROTOCOL_VERSION:
            text = f"the core speaks protocol {hello.protocol_version}, this worker {PROTOCOL_VERSION}"
            logger.error(text)
            self._page.set_text("error", text)
            self._page.set("state", State.FAILED)
            self._exit_code = 1
            return
        if hello.epoch < self._epoch:
            return
        if hello.epoch > self._epoch:
            self._epoch = hello.epoch
            self._plans.clear()
            self._worker.runner.reset()
            self._page.set("epoch", hello.epoch)
        self._send(self._ready())

    def _ready(self) -> WorkerReady:
        worker, spec = self._worker, self._worker.runner.model.spec
        return WorkerReady(
            epoch=self._epoch, gen=self._context.gen, numerics_fingerprint=worker.numerics_fingerprint,
            num_blocks=worker.num_blocks, max_num_seqs=worker.runner.states.max_num_seqs, vocab_size=spec.vocab_size,
            eos_token_ids=i32_bytes(spec.eos_token_ids), capabilities=[] if worker.device == "cpu" else ["cuda"],
            max_model_len=worker.max_model_len, bit_exact=worker.bit_exact)

    def _run_plan(self, plan: StepPlan) -> None:
        self._page.add("steps_started")
        result = self._worker.runner.execute(plan)
        self._page.add("tokens", len(result.token_ids) // 4)
        if result.timings_us is not None:
            self._page.set("step_us", int(i32_column(result.timings_us)[-1]))
            self._page.add("computed_tokens", int(i32_column(plan.num_tokens).sum()) * plan.num_steps)
        self._page.add("steps_done")
        self._send(result)      # last: who has the result finds it counted

    def _send(self, message: Hello | WorkerReady | StepResult) -> None:
        self._unsent.append(to_core.encode(message))
        self._flush()

    def _flush(self) -> None:
        while self._unsent and self._link.send(self._unsent[0]) is Sent.OK:
            self._unsent.popleft()


if __name__ == "__main__":
    sys.exit(main())
