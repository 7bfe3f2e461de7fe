"""What is drawn once for each seed: the engine's settings, the pace of everybody, what goes wrong."""

from __future__ import annotations

import random
from dataclasses import dataclass

import msgspec

from protocol.config import SchedulerConfig

BLOCK = 4                    # tokens
NO_BOUND = 10**6


@dataclass
class World:
    """Rates are probabilities at each turn of the driver, or for each message, step or request."""

    config: SchedulerConfig
    num_blocks: int
    max_model_len: int       # tokens
    # How often each part moves when it could.
    schedule: float = 1.0
    work: float = 1.0
    apply: float = 1.0
    carry: float = 1.0       # frames between frontends and core
    arrive: float = 1.0
    most_open: int = NO_BOUND    # streams: nobody comes while so many are open
    most_prompt: int = 26        # tokens
    most_output: int = 14        # tokens
    most_stops: int = 11         # ids of one request
    talk: float = 0.0        # of the ended streams: a next turn follows
    # What goes wrong.
    loss: float = 0.0        # of frames between frontends and core, both ways
    abort: float = 0.0
    leave: float = 0.0       # a frontend goes, another comes
    fail: float = 0.0        # steps, by chance
    row_error: float = 0.0   # rows, by chance
    token_cap: int = NO_BOUND    # a step of more tokens has not memory enough
    row_cap: int = NO_BOUND      # a step of more rows neither
    poison: str = ""             # "internal", "memory", "row": what some requests do to their steps
    share_logprobs: float = 0.0  # of the requests
    token_us: int = 0            # what the worker says that a token of a step takes; 0: it says nothing
    # No life is shorter.
    num_requests: int = 28
    num_steps: int = 100         # that were not skipped


def with_small_blocks(config: SchedulerConfig, window: int | None = None) -> SchedulerConfig:
    """Short prompts are interesting then; and a window wider than users may ask for keeps more in flight."""
    msgspec.structs.force_setattr(config, "block_size", BLOCK)
    msgspec.structs.force_setattr(config, "window", window or config.window)
    return config


def draw_world(rng: random.Random) -> World:
    few = rng.random() < 0.4      # requests at a time, so that nobody waits, and their growth fills the pool
    num_blocks = rng.choice([6, 7, 8] if few else [6, 7, 8, 10, 14, 20])
    holds = num_blocks * BLOCK
    config = SchedulerConfig(
        max_num_seqs=rng.randint(2, 7), max_num_batched_tokens=rng.choice([2, 3, 5, 8, 8, 16, 16, 32, 32]),
        scheduling_policy=rng.choice(["fcfs", "priority"]), enable_prefix_caching=rng.random() < 0.8,
        watermark=rng.choice([0.0, 0.0, 0.1, 0.2]), max_num_queued_reqs=rng.choice([1000] * 7 + [5]),
        max_decode_steps=rng.choice([1, 4, 4, 7]), speculative=rng.choice(["none", "ngram"]), num_speculative_tokens=rng.choice([1, 3, 6]))
    world = World(
        with_small_blocks(config, rng.choice([1, 2, 2, 3, 3])), num_blocks, max_model_len=rng.choice([rng.randint(16, min(holds, 56)), min(holds, 40), holds + 5]),
        schedule=rng.choice([0.4, 0.7, 1.0]), work=rng.choice([0.4, 0.8]), apply=rng.choice([0.4, 0.8]), carry=rng.choice([0.5, 1.0]),
        arrive=rng.choice([0.1, 0.25, 0.9]), share_logprobs=rng.choice([0.0, 0.0, 0.3]))
    world.talk = 0.5
    if few:
        world.most_open, world.most_prompt, world.most_output, world.most_stops = 3, 8, 24, 1
    world.token_us = rng.choice([0, 0, 0, 200, 1000, 6000])
    world.loss = rng.choice([0.0, 0.0, 0.0, 0.02])
    world.abort = rng.choice([0.0, 0.02, 0.06])
    world.leave = rng.choice([0.0, 0.0, 0.0, 0.01])
    draw_faults(rng, world)
    return world


def draw_faults(rng: random.Random, world: World) -> None:
    kind = rng.choice(["none", "none", "chance", "chance", "memory", "poison"])
    if kind == "chance":
        world.fail = rng.choice([0.03, 0.08])
        world.row_error = rng.choice([0.0, 0.01])
    elif kind == "memory":
        world.token_cap = rng.choice([1, 2, 4, 8])
        world.row_cap = rng.choice([1, 2, NO_BOUND])
    elif kind == "poison":
        world.poison = rng.choice(["internal", "memory", "row"])
        world.fail = rng.choice([0.0, 0.0, 0.03])
