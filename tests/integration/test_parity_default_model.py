"""The default model in float32 against transformers: tokens and logits, 32 requests in one batch."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch

from determinism_matrix import ordinary_text
from frontend.tokenizer import Tokenizer
from gpu_worker.device import choose_threads
from gpu_worker.models.registry import load_model
from in_process_engine import Continuation, InProcessEngine
from parity import compare, transformers_reference

REQUESTS, LONGEST_PROMPT, MAX_TOKENS, BUDGET = 32, 1000, 64, 64       # requests, tokens


def license_text() -> str:
    """Python's LICENSE; empty where it was installed without."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = [folder / name for folder in (library, library.parent) for name in ("LICENSE.txt", "LICENSE") if (folder / name).is_file()]
    return found[0].read_text(encoding="utf-8") if found else ""


def prompts_of(model_dir: Path) -> list[list[int]]:
    """Ordinary text, each from another place: 32 even steps of the logarithm from 1 to 1,000 tokens."""
    ids = Tokenizer(model_dir).encode(license_text() + ordinary_text())
    lengths = [round(LONGEST_PROMPT ** (i / (REQUESTS - 1))) for i in range(REQUESTS)]
    return [ids[307 * i:307 * i + length] for i, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def streams(default_model_dir: Path) -> list[Continuation]:
    model = load_model(default_model_dir, dtype="float32", device=torch.device("cpu"), num_threads=choose_threads(None))
    engine = InProcessEngine(model, max_model_len=2048, num_blocks=512, max_num_seqs=REQUESTS, max_num_batched_tokens=BUDGET)
    streams = engine.generate(prompts_of(default_model_dir), MAX_TOKENS)
    assert max(engine.rows_per_step) > REQUESTS // 2              # one batch; the first ones end before the last one begins
    assert len(streams[-1].chunks) > LONGEST_PROMPT // BUDGET     # a long prompt in chunks, beside decodes
    return streams


def test_tokens_and_logits_are_those_of_transformers(default_model_dir: Path, streams: list[Continuation]) -> None:
    found = compare(streams, transformers_reference(default_model_dir))
    assert found.other_tokens == []
    assert found.largest_difference <= 1e-3


def test_the_requests_are_not_all_the_same(streams: list[Continuation]) -> None:
    assert [len(stream.prompt) for stream in streams][::31] == [1, LONGEST_PROMPT]
    assert len({tuple(stream.token_ids) for stream in streams}) == REQUESTS
