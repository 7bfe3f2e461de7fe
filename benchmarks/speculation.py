"""20 prompts whose answers quote them (summarize, edit code, extract), one after another.

    python benchmarks/speculation.py --peers DIR

The prompts stand in ``prompts/``; each is a user turn through the model's chat template, and
every engine gets the same token ids.  How many tokens each answer has is what the first mode of
ours writes until it ends, at most ``--max-tokens``; all engines write exactly as many.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import harness
from engines import Engine, OurEngine
from folovllm import SamplingParams
from frontend.chat_template import ChatTemplate
from frontend.tokenizer import Tokenizer
from peer_process import DEFAULT_PEERS
from protocol.messages import ChatMessage
from report import Metric
from workload import Work

PROMPTS = Path(__file__).resolve().parent / "prompts"
KINDS = ("summarize", "edit", "extract")
METRICS = [Metric(name, "tokens/s") for name in ("all prompts", *KINDS)]
PEERS = [*(name for name in DEFAULT_PEERS if name != "transformers"), "openvino_lookup"]
OURS = [harness.INT8, *(f"{name} ngram: {flags} speculative=ngram" for name, flags in
        (("int8", "quantization=int8"), ("int4", "quantization=int4"), ("bf16", "dtype=bfloat16")))]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One committed prompt."""

    name: str                    # e.g. "edit_3"
    kind: str
    token_ids: list[int]


def read_prompts(checkpoint: Path, limit: int | None = None) -> list[Prompt]:
    """In the order of their names; with ``limit`` only so many, the kinds in turn."""
    tokenizer = Tokenizer(checkpoint)
    template = ChatTemplate.load(checkpoint, tokenizer)
    found = []
    for path in sorted(PROMPTS.glob("*.txt"), key=lambda path: (path.stem.split("_")[1], path.stem)):
        text = path.read_text(encoding="utf-8").rstrip("\n")
        ids = tokenizer.encode(text) if template is None else template.render([ChatMessage("user", text)])
        found.append(Prompt(path.stem, path.stem.split("_")[0], ids))
    return found[:limit]


def natural_work(engine: OurEngine, prompts: list[Prompt], max_tokens: int) -> Work:
    """Each prompt with the number of tokens that ``engine`` writes until it ends."""
    params = SamplingParams(max_tokens=max_tokens, min_tokens=min(2, max_tokens), temperature=0)
    outputs = engine.engine.generate([prompt.token_ids for prompt in prompts], params, use_tqdm=False)
    return [(prompt.token_ids, len(output.outputs[0].token_ids)) for prompt, output in zip(prompts, outputs)]


def main() -> None:
    parser = harness.parser(__doc__, ours=OURS, peers=PEERS)
    parser.add_argument("--max-tokens", type=int, default=200, help="most output tokens of a prompt (default: 200)")
    parser.add_argument("--requests", type=int, help="prompts, instead of all 20")
    arguments = parser.parse_args()
    report = harness.new_report("speculation", "prompts", METRICS, arguments)
    with harness.Session(arguments, report) as session:
        prompts = read_prompts(session.target.checkpoint, arguments.requests)
        session.load(width=1)
        ours = [engine for engine in session.engines if engine.is_ours]
        if not ours:
            raise SystemExit("no mode of ours runs, so nobody says how long the answers are: " + "; ".join(report.missing.values()))
        work = natural_work(ours[0], prompts, arguments.max_tokens)
        report.note(f"{sum(len(p) for p, _ in work)} prompt and {sum(n for _, n in work)} output tokens, lengths by {ours[0].name}: "
                    + ", ".join(f"{prompt.name} {count}" for prompt, (_, count) in zip(prompts, work)))

        def measure(engine: Engine) -> dict[str, float]:
            values, tokens, seconds = {}, 0, 0.0
            for kind in KINDS:
                own = [request for prompt, request in zip(prompts, work) if prompt.kind == kind]
                if own:
                    result = engine.run(own, one_by_one=True)
                    values[kind] = result.rate
                    tokens, seconds = tokens + sum(result.counts), seconds + result.seconds
            return values | {METRICS[0].name: tokens / seconds}

        session.alternate(f"{len(prompts)} prompts", measure)
    report.finish(arguments.out)


if __name__ == "__main__":
    main()
