"""Workload W: mixed prompt and output lengths, random token ids, the same for every engine."""

from __future__ import annotations

import random


def make_workload(num_requests: int = 64, seed: int = 0) -> list[tuple[list[int], int]]:
    """[(prompt token ids, output tokens)]; 64 requests of seed 0: 8,355 prompt and 5,088 output tokens."""
    generator = random.Random(seed)
    work = []
    for _ in range(num_requests):
        prompt_tokens, output_tokens = generator.randint(16, 256), generator.randint(32, 128)
        work.append(([generator.randint(100, 40000) for _ in range(prompt_tokens)], output_tokens))
    return work
