"""The requests of one life: shared beginnings, children, resumed streams, conversations."""

from __future__ import annotations

import random
from dataclasses import replace

from protocol.messages import OutputKind
from simulation.reference import VOCAB, Wish
from simulation.world import BLOCK, World


class Arrivals:
    """Draws wishes; each has a key and a seed of its own."""

    def __init__(self, rng: random.Random, world: World) -> None:
        self.rng, self.world = rng, world
        self.number = 0
        self._shared = [self._tokens(world.most_prompt) for _ in range(rng.choice([1, 2, 3]))]

    def draw(self) -> list[Wish]:
        """One request: all its children."""
        wish = self._wish(self._prompt(), self.world.most_output)
        children = self.rng.randint(2, 4) if self.rng.random() < 0.12 else 1
        return [wish] + [self._resumed(replace(wish, child=child, seed=wish.seed + child, prompt_logprobs=None, forced=[]))
                         for child in range(1, children)]

    def next_turn(self, wish: Wish, output: list[int]) -> Wish | None:
        """What follows in a conversation, if anything: what was said is prompt now."""
        said = wish.prompt + output
        more = self.rng.choice([0, 0, 1, 3, 6])
        if wish.child or self.rng.random() > self.world.talk or len(said) + more + 4 > self.world.max_model_len:
            return None
        follow = self._wish(said + self._tokens(more), 4)
        return replace(follow, continues=len(said) % BLOCK == 0, cache_salt=wish.cache_salt)

    def again(self, wish: Wish) -> Wish:
        """The same key by a newer attach."""
        return replace(wish, attach_no=wish.attach_no + 1, forced=[])

    def _wish(self, prompt: list[int], most_output: int) -> Wish:
        rng, self.number = self.rng, self.number + 1
        max_tokens = rng.randint(1, most_output)
        if rng.random() < 0.4:       # may end exactly on a block boundary
            max_tokens += -(len(prompt) + max_tokens) % BLOCK
        if rng.random() < 0.97:      # else: perhaps too long, to be refused
            max_tokens = max(1, min(max_tokens, self.world.max_model_len - len(prompt)))
        stops = rng.sample(range(VOCAB), min(rng.choice([0, 1, 2, 11]), self.world.most_stops))
        asks = rng.random() < self.world.share_logprobs
        return self._resumed(Wish(
            key=self.number.to_bytes(16, "big"), child=0, prompt=prompt, max_tokens=max_tokens, seed=rng.randrange(2**40) * 16,
            stop_ids=frozenset(stops[1:]), eos_ids=frozenset(stops[:1]), min_tokens=rng.choice([0, 0, min(3, max_tokens)]),
            logprobs=rng.choice([None, 0, 2]) if asks else None, prompt_logprobs=rng.choice([None, 0, 1]) if asks else None,
            priority=rng.choice([0, 0, 0, -1, 2]), kind=OutputKind.FINAL if rng.random() < 0.2 else OutputKind.DELTA,
            interval=rng.choice([1, 1, 1, 3]), cache_salt=rng.choice([None, None, None, None, None, None, b"a", b""]),
            attach_no=rng.choice([0, 0, 1])))

    def _resumed(self, wish: Wish) -> Wish:
        """Now and then a part of its output, or all of it, is already there."""
        if self.rng.random() > 0.08:
            return wish
        expected = wish.expected()
        return replace(wish, forced=expected[:self.rng.randint(0, len(expected))])

    def _prompt(self) -> list[int]:
        rng = self.rng
        length = rng.randint(1, min(self.world.most_prompt, self.world.max_model_len - 1))
        if rng.random() < 0.3:
            length = max(BLOCK, length // BLOCK * BLOCK)
        shared = rng.randint(0, length) if rng.random() < 0.7 else length
        prompt = rng.choice(self._shared)[:shared] + self._tokens(length - shared)
        if rng.random() < 0.1:       # equal blocks behind something else
            prompt[rng.randrange(min(length, BLOCK))] = rng.randrange(VOCAB)
        if rng.random() < 0.05:      # equal blocks at other places
            prompt = (prompt[:BLOCK] * length)[:length]
        return prompt

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(VOCAB) for _ in range(count)]
