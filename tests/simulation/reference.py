"""What a request must give, by definition: no engine, no batch, no memory."""

from __future__ import annotations

from dataclasses import dataclass, field

VOCAB = 23
ROOT = 7                     # prefix hash of nothing


def extend(prefix: int, token: int) -> int:
    """The identity of a prefix: what K/V at its last position depends on."""
    return hash((prefix, token))


def next_token(prefix: int, seed: int, num_output: int, stop_ids: frozenset[int], min_tokens: int) -> int:
    """The token that the fake model samples after ``prefix``."""
    token = hash((prefix, seed, num_output)) % VOCAB
    while num_output < min_tokens and token in stop_ids:
        token = (token + 1) % VOCAB
    return token


@dataclass
class Wish:
    """One child request as the driver makes it."""

    number: int
    child: int
    prompt: list[int]
    max_tokens: int
    seed: int
    stop_ids: frozenset[int]
    min_tokens: int = 0
    priority: int = 0
    forced: list[int] = field(default_factory=list)      # output it arrives with
    final: bool = False
    interval: int = 1
    continues: bool = False      # its prompt is another's prompt and output, ended on a block boundary

    @property
    def key(self) -> bytes:
        return self.number.to_bytes(16, "big")

    @property
    def stream(self) -> int:
        return self.number * 16 + self.child

    def expected(self) -> list[int]:
        """All output tokens."""
        prefix = ROOT
        for token in self.prompt:
            prefix = extend(prefix, token)
        output: list[int] = []
        while len(output) < self.max_tokens:
            token = next_token(prefix, self.seed, len(output), self.stop_ids, self.min_tokens)
            output.append(token)
            if token in self.stop_ids and len(output) >= self.min_tokens:
                break
            prefix = extend(prefix, token)
        return output
