"""One request with a long prompt: prefill and decode by the length of the context, ours beside the peers.

    python benchmarks/long_context.py --peers DIR

Prefill is the prompt's tokens over the time to the first output token; decode is 64 further tokens
over the time from there to the last, of one and the same stream: a prefill takes many times as
long, and two of them differ by more than those tokens.  Every run has a prompt of its own, prefix
caches are off.  The streams are those of ``serving.py``.
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import harness
from engines import Engine
from peer_process import DEFAULT_PEERS
from report import Metric
from serving import serve
from workload import make_equal

PREFILL, DECODE = Metric("prefill", "tokens/s", digits=0), Metric("decode", "tokens/s")
PEERS = [name for name in DEFAULT_PEERS if name != "transformers"]     # minutes for 8,000 tokens
OURS = [harness.BF16, "int8, int8 KV: quantization=int8 kv-cache-dtype=int8"]


def main() -> None:
    parser = harness.parser(__doc__, ours=OURS, peers=PEERS, max_model_len=8192)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 8000], help="prompt tokens (default: 1024 4096 8000)")
    parser.add_argument("--decode-tokens", type=int, default=64, help="measured after the first (default: 64)")
    arguments = parser.parse_args()
    report = harness.new_report("long_context", "context", [PREFILL, DECODE], arguments)
    seeds = count()
    with harness.Session(arguments, report) as session:
        session.load(width=1, serving=True, warm=False)
        for context in arguments.contexts:

            def measure(engine: Engine, context: int = context) -> dict[str, float]:
                [stream] = serve(engine, make_equal(1, context, 1 + arguments.decode_tokens, next(seeds)), [0.0])
                return {PREFILL.name: context / stream.ttft_s} | harness.positive(
                    DECODE.name, arguments.decode_tokens, stream.times_s[-1] - stream.times_s[0])

            session.alternate(context, measure, warm_ups=1)
    report.finish(arguments.out)


if __name__ == "__main__":
    main()
