"""Serving at fixed request rates: time to first token, per output token, and between tokens.

    python benchmarks/serving.py --peers DIR --rates 1 2 4

Ours through the SDK's AsyncClient, each request a stream; the peers inside their own process
(OpenVINO's pipeline step by step, vLLM's async engine, llama.cpp's server), which spares them
the way to a client.  Requests come at Poisson times, the same for every engine; the time to
the first token counts from when a request was due.  vLLM has its async engine for this.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import harness
from engines import Engine, NotRunning, OurEngine
from folovllm import AsyncClient, SamplingParams
from frontend.errors import EngineError
from peer_process import DEFAULT_PEERS
from percentiles import QUANTILES, Stream, summary_ms, tokens_per_s
from report import Metric
from workload import Work, make_equal, poisson_times

METRICS = [*(Metric(f"{name} p{quantile}", "ms", higher_is_better=False, digits=0)
             for name in ("TTFT", "TPOT", "ITL") for quantile in QUANTILES), Metric("output tokens", "tokens/s")]
PEERS = [name for name in DEFAULT_PEERS if name != "transformers"]


async def serve_ours(run_dir: str, work: Work, due_s: list[float]) -> list[list[float]]:
    """For each request the times of its tokens, s since the start."""
    async with AsyncClient(run_dir) as client:
        started_s = time.perf_counter()

        async def one(prompt: list[int], count: int, due_s: float) -> list[float]:
            await asyncio.sleep(max(0.0, due_s - (time.perf_counter() - started_s)))
            times_s: list[float] = []
            params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
            async for delta in client.stream(prompt, params):
                times_s += [time.perf_counter() - started_s] * len(delta.token_ids)
            return times_s

        return await asyncio.gather(*(one(*request, due) for request, due in zip(work, due_s)))


def serve(engine: Engine, work: Work, due_s: list[float]) -> list[Stream]:
    """Raises NotRunning where a stream is not whole."""
    if engine.one_at_a_time:
        raise NotRunning("takes one request at a time: it does not serve")
    if isinstance(engine, OurEngine):
        try:
            times_s = asyncio.run(serve_ours(str(engine.engine.run_dir.path), work, due_s))
        except EngineError as error:
            raise NotRunning(str(error)) from None
    else:
        times_s = engine.serve(work, due_s)
    short = [i for i, (times, (_, count)) in enumerate(zip(times_s, work)) if len(times) != count]
    if short:
        raise NotRunning(f"gave {len(times_s[short[0]])} tokens for request {short[0]} instead of {work[short[0]][1]}")
    return [Stream(due, times) for due, times in zip(due_s, times_s)]


def main() -> None:
    parser = harness.parser(__doc__, peers=PEERS)
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 2, 4], help="requests a second (default: 1 2 4)")
    parser.add_argument("--seconds", type=float, default=60, help="of arrivals at each rate (default: 60)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--width", type=int, default=64, help="most requests running at once (default: 64)")
    arguments = parser.parse_args()
    report = harness.new_report("serving", "requests/s", METRICS, arguments, wide=True)
    with harness.Session(arguments, report) as session:
        session.load(arguments.width, serving=True, warm=False)
        warm = make_equal(8, arguments.prompt_tokens, 8, seed=99)
        for rate in arguments.rates:
            count = max(2, round(rate * arguments.seconds))
            report.note(f"at {rate:g} requests/s: {count} requests of {arguments.prompt_tokens} prompt and {arguments.output_tokens} output tokens")

            def measure(engine: Engine, rate: float = rate, count: int = count) -> dict[str, float]:
                serve(engine, warm, poisson_times(8, len(warm), seed=99))
                streams = serve(engine, make_equal(count, arguments.prompt_tokens, arguments.output_tokens, seed=1),
                                poisson_times(rate, count))
                return summary_ms(streams) | {METRICS[-1].name: tokens_per_s(streams)}

            session.alternate(rate, measure)
    report.finish(arguments.out)


if __name__ == "__main__":
    main()
