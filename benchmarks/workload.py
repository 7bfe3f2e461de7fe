"""Workload W and its relatives: random token ids, the same for every engine."""

from __future__ import annotations

import random

Work = list[tuple[list[int], int]]     # [(prompt token ids, output tokens)]


def make_workload(num_requests: int = 64, seed: int = 0) -> Work:
    """64 requests of seed 0: 8,355 prompt and 5,088 output tokens."""
    generator = random.Random(seed)
    work = []
    for _ in range(num_requests):
        prompt_tokens, output_tokens = generator.randint(16, 256), generator.randint(32, 128)
        work.append(([generator.randint(100, 40000) for _ in range(prompt_tokens)], output_tokens))
    return work


def make_equal(num_requests: int, prompt_tokens: int, output_tokens: int, seed: int) -> Work:
    """Requests of one size."""
    generator = random.Random(seed)
    return [([generator.randint(100, 40000) for _ in range(prompt_tokens)], output_tokens) for _ in range(num_requests)]


def prefills(work: Work) -> Work:
    """The same prompts with one output token each: what is left of a run without decoding."""
    return [(prompt, 1) for prompt, _ in work]


def poisson_times(rate: float, count: int, seed: int = 0) -> list[float]:
    """When ``count`` requests are due, s from the start: ``rate`` a second on average, in bursts as they come."""
    generator, now_s, due_s = random.Random(seed), 0.0, []
    for _ in range(count):
        now_s += generator.expovariate(rate)
        due_s.append(now_s)
    return due_s
