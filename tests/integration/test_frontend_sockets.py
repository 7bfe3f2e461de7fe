"""Clients, frontend and a fake core over real sockets, without a model."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from frontend.client import AsyncClient, Client
from frontend.errors import EngineDead, EngineError, EngineNotRunning
from frontend_fakes import FakeTokenizer
from frontend_harness import FrontendHarness, expected, expected_text
from protocol.messages import Drain, PeerDied
from protocol.progress import State
from protocol.sampling_params import BadRequest, RequestOutputKind, SamplingParams
from protocol.transport import Link, new_context

TEN = SamplingParams(max_tokens=10)
LONG = SamplingParams(max_tokens=5000, stop="!")      # the stop string makes the core show its tokens


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[FrontendHarness]:
    harness = FrontendHarness(tmp_path).start()
    yield harness
    harness.stop()


@pytest.fixture
def client(engine: FrontendHarness) -> Iterator[Client]:
    with Client(engine.run_dir) as client:
        yield client


def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Wait for something that the other threads do."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.005)


def test_stream_gives_deltas_and_the_whole(client: Client) -> None:
    stream = client.stream([3, 1], TEN)
    text = "".join(delta.text for delta in stream)
    output = stream.output
    assert text == output.outputs[0].text == expected_text([1], 10)
    assert output.outputs[0].token_ids == expected([1], 10) and output.prompt_token_ids == [3, 1]
    assert output.finished and output.outputs[0].finish_reason == "length" and output.metrics is not None
    assert len(output.metrics.inter_token_times_s) > 1 and (client.model, client.max_model_len) == ("fake", 10_000)


def test_stream_gives_what_its_output_kind_says(client: Client) -> None:
    growing = list(client.stream([1], SamplingParams(max_tokens=10, output_kind=RequestOutputKind.CUMULATIVE)))
    assert len(growing) > 1 and all(a.text < b.text for a, b in zip(growing, growing[1:]))
    final, = client.stream([1], SamplingParams(max_tokens=10, output_kind=RequestOutputKind.FINAL_ONLY))
    assert final == growing[-1] and (final.token_ids, final.text, final.finish_reason) == (expected([1], 10), expected_text([1], 10), "length")
    with pytest.raises(BadRequest, match=r"output_kind: was DELTA .*; allowed: CUMULATIVE or FINAL_ONLY, or a stream"):
        client.generate([[1]], SamplingParams(output_kind=RequestOutputKind.DELTA))
    with pytest.raises(BadRequest, match="stream_interval: was 2 beside output_kind FINAL_ONLY; allowed: 1"):
        client.stream([1], SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY), stream_interval=2)


def test_generate_keeps_input_order_and_takes_params_for_each(client: Client) -> None:
    params = [SamplingParams(max_tokens=n, n=1 + n % 2) for n in (7, 2, 5)]
    results = client.generate(["abc", [5], "z"], params)
    assert [r.prompt for r in results] == ["abc", None, "z"]
    assert [len(r.outputs) for r in results] == [2, 1, 2]
    for prompt, count, result in ([3], 7, results[0]), ([5], 2, results[1]), ([26], 5, results[2]):
        assert {tuple(o.token_ids) for o in result.outputs} == {tuple(expected(prompt, count))}
        assert {o.text for o in result.outputs} == {expected_text(prompt, count)}
    assert client.generate([]) == []


def test_many_more_prompts_than_may_be_open(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frontend.client_session.MAX_OPEN_CHILDREN", 20)
    results = client.generate([[1 + i % 26] for i in range(150)], SamplingParams(max_tokens=3))
    assert [r.outputs[0].token_ids for r in results] == [expected([1 + i % 26], 3) for i in range(150)]


def test_generate_batch_goes_through_the_chat_template_under_own_labels(client: Client) -> None:
    outputs = client.generate_batch(["abc", [4]], TEN, request_ids=["x", "y"])
    assert list(outputs) == ["x", "y"] and outputs["x"].prompt == "abc"
    assert outputs["x"].prompt_token_ids == [1, 2, 3] and outputs["y"].outputs[0].token_ids == expected([4], 10)


def test_chat_streams_or_gives_the_whole(client: Client) -> None:
    messages = [{"role": "user", "content": "ab"}]
    assert "".join(d.text for d in client.chat(messages, TEN)) == expected_text([2], 10)
    whole = client.chat([messages, messages], TEN, stream=False)
    assert [o.outputs[0].text for o in whole] == [expected_text([2], 10)] * 2


def test_a_bad_prompt_among_many_is_named_and_the_others_are_aborted(client: Client, engine: FrontendHarness) -> None:
    with pytest.raises(BadRequest, match=r"prompts\[1\]"):
        client.generate([[1], [999], [2]], LONG)
    until(lambda: engine.frontend.session.num_open == 0)
    assert [o.outputs[0].token_ids for o in client.generate([[1]], TEN)] == [expected([1], 10)]


def test_leaving_a_stream_aborts_it(client: Client, engine: FrontendHarness) -> None:
    for delta in client.stream([1], LONG):
        break
    until(lambda: engine.core.aborts)
    with client.stream([2], LONG) as stream:
        next(stream)
    until(lambda: len(engine.core.aborts) == 2)
    stream = client.stream([3], LONG, request_id="mine")
    next(stream)
    client.abort("mine")
    assert list(stream)[-1:] == [] or stream.output.outputs[0].finish_reason == "abort"
    until(lambda: engine.frontend.session.num_open == 0)


def test_stop_strings_abort_in_the_core_and_cut_exactly(client: Client, engine: FrontendHarness) -> None:
    output, = client.generate([[1]], SamplingParams(max_tokens=5000, stop="ghi"))
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("bcdef", "ghi")
    assert output.outputs[0].token_ids == [2, 3, 4, 5, 6, 7, 8, 9]
    until(lambda: engine.core.aborts)


def test_a_client_that_vanishes_has_its_requests_aborted(engine: FrontendHarness) -> None:
    client = Client(engine.run_dir)
    stream = client.stream([1], LONG)
    next(stream)
    engine.core.paused.set()                  # so that only the Ping can tell
    client._link.socket.close(linger=0)       # as a killed process leaves it
    until(lambda: engine.core.aborts)
    client._closed = True


def test_requests_from_two_clients_do_not_meet(engine: FrontendHarness) -> None:
    with Client(engine.run_dir) as one, Client(engine.run_dir) as two:
        first, second = one.stream([1], LONG), two.stream([2], TEN)
        next(first)
        assert second.result().outputs[0].token_ids == expected([2], 10)
        one.close()
        until(lambda: engine.frontend.session.num_open == 0)


def test_losing_core_or_worker_ends_every_stream_by_a_typed_error(client: Client, engine: FrontendHarness) -> None:
    stream = client.stream([1], LONG)
    got = [next(stream)]
    engine.tell(PeerDied("worker", b"w0.g1"))
    with pytest.raises(EngineDead, match="core or worker"):
        got.extend(stream)
    assert [t for d in got for t in d.token_ids] == stream.output.outputs[0].token_ids
    with pytest.raises(EngineDead):
        client.generate([[1]], TEN)


def test_drain_lets_streams_finish_and_refuses_new_ones(client: Client, engine: FrontendHarness) -> None:
    engine.core.paused.set()
    stream = client.stream([1], TEN)
    until(lambda: engine.core.adds)
    engine.tell(Drain(5.0))
    until(lambda: engine.page.get("state") == State.DRAINING)
    with pytest.raises(EngineDead, match="stopping"):
        client.generate([[1]], TEN)
    engine.core.paused.clear()
    assert stream.result().outputs[0].token_ids == expected([1], 10)
    assert engine.wait_for_exit() == 0 and not engine.run_dir.client_socket.exists()


def test_drain_ends_what_is_not_done_in_time(client: Client, engine: FrontendHarness) -> None:
    stream = client.stream([1], LONG)
    next(stream)
    engine.tell(Drain(0.0))
    with pytest.raises(EngineDead, match="shutting down"):
        stream.result()
    assert engine.wait_for_exit() == 0


def test_the_parents_end_is_the_frontends_end(client: Client, engine: FrontendHarness) -> None:
    engine.parent_dies()
    assert engine.wait_for_exit() == 0 and not engine.run_dir.client_socket.exists()


def test_a_dead_frontend_is_noticed_without_a_word(client: Client, engine: FrontendHarness) -> None:
    engine.core.paused.set()
    stream = client.stream([1], LONG)
    until(lambda: engine.core.adds)

    def die(*_: object) -> None:
        raise SystemExit

    engine.frontend.clients.send = die        # no Ping, no goodbye
    engine.page.set("pid", 2**22 + 1)
    with pytest.raises(EngineDead, match="frontend process"):
        next(stream)


def test_garbage_disturbs_nobody(client: Client, engine: FrontendHarness) -> None:
    link = Link(new_context(), engine.run_dir.client_socket, b"hostile")
    for frame in (b"", b"\xc1", b"\x91" * 5000, b"\x91\x63", b"\x93\x1e\xc4\x10" + b"k" * 16 + b"\xc0"):
        link.send(frame)
    assert client.generate([[1]], TEN)[0].outputs[0].token_ids == expected([1], 10)
    assert link.socket.poll(2000) and len(link.receive()) > 0       # each was answered by an Error
    link.close()


def test_a_slow_long_prompt_stalls_nobody(client: Client, engine: FrontendHarness,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    encode = FakeTokenizer.encode

    def slow(self: FakeTokenizer, text: str) -> list[int]:
        while len(text) > 20_000 and not engine.core.adds:      # until the short one is through
            time.sleep(0.005)
        return encode(self, text)[-5:]

    monkeypatch.setattr(FakeTokenizer, "encode", slow)
    long = client.stream("a" * 20_001, TEN)
    assert client.stream("b", TEN).result().outputs[0].text == expected_text([2], 10)
    assert long.result().outputs[0].text == expected_text([1], 10)
    assert [add.prompt_ids[:4] for add in engine.core.adds] == [b"\x02\0\0\0", b"\x01\0\0\0"]


def test_idle_it_sleeps(client: Client, engine: FrontendHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    client.generate([[1]], TEN)
    turns = []
    monkeypatch.setattr(engine.frontend, "_flush", lambda: turns.append(time.monotonic()))
    time.sleep(1.6)
    assert len(turns) <= 4                     # the tick of a second, its heartbeat, nothing else


def test_a_forked_child_cannot_use_or_close_the_client(client: Client) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            client.generate([[1]], TEN)
        except EngineError as error:
            client.close()
            os._exit(17 if "fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 17
    assert client.generate([[1]], TEN)[0].outputs[0].token_ids == expected([1], 10)


def test_connecting_gives_up_in_time(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(str(os.getpid()))      # launch.py lives, but nothing answers
    with pytest.raises(EngineNotRunning, match="not ready within 0.2 s"):
        Client(str(tmp_path), timeout_s=0.2)


# --- asyncio -------------------------------------------------------------------------------


def test_async_streams_run_side_by_side(engine: FrontendHarness) -> None:
    async def main() -> None:
        async with AsyncClient(engine.run_dir) as client:
            async def text(prompt: int) -> str:
                return "".join([delta.text async for delta in client.stream([prompt], TEN)])

            assert await asyncio.gather(*map(text, range(1, 20))) == [expected_text([i], 10) for i in range(1, 20)]
            whole = await client.chat("ab", TEN).result()
            assert whole.outputs[0].text == expected_text([2], 10)

    asyncio.run(main())


def test_async_generate_and_batch(engine: FrontendHarness) -> None:
    async def main() -> None:
        client = AsyncClient(engine.run_dir)
        one, two = await asyncio.gather(client.generate([[1], [2]], TEN),
                                        client.generate_batch(["c"], TEN, request_ids=["id"]))
        final, = [delta async for delta in client.stream([1], SamplingParams(max_tokens=10, output_kind=RequestOutputKind.FINAL_ONLY))]
        assert final.token_ids == expected([1], 10)
        assert [o.outputs[0].token_ids for o in one] == [expected([1], 10), expected([2], 10)]
        assert two["id"].outputs[0].text == expected_text([3], 10)
        with pytest.raises(BadRequest, match=r"prompts\[0\]"):
            await client.generate([[999], [1]], LONG)
        await client.close()
        with pytest.raises(EngineError, match="closed"):
            await client.generate([[1]], TEN)

    asyncio.run(main())
    until(lambda: engine.frontend.session.num_open == 0)


def test_a_cancelled_task_and_a_left_iterator_abort(engine: FrontendHarness) -> None:
    async def main() -> None:
        async with AsyncClient(engine.run_dir) as client:
            task = asyncio.create_task(client.generate([[1], [2]], LONG))
            await asyncio.sleep(0)
            async for _delta in client.stream([3], LONG):
                break
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert client.session.num_open == 0
            assert (await client.generate([[4]], TEN))[0].outputs[0].token_ids == expected([4], 10)

    asyncio.run(main())
    until(lambda: engine.frontend.session.num_open == 0)
    until(lambda: len(engine.core.aborts) == 3)


def test_async_waiters_hear_of_a_death(engine: FrontendHarness) -> None:
    async def main() -> None:
        async with AsyncClient(engine.run_dir) as client:
            stream = client.stream([1], LONG)
            await anext(stream)
            engine.tell(PeerDied("core", b"c0.e1"))
            with pytest.raises(EngineDead):
                await stream.result()

    asyncio.run(main())
