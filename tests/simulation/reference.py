"""What a request must give, by definition: no engine, no batch, no memory.

``hash`` of integers and of tuples of them does not depend on PYTHONHASHSEED, so a seed is the
same life in every process.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.codec import i32_bytes
from protocol.messages import OutputKind
from protocol.sampling_params import TokenParams

VOCAB = 23
ROOT = 7                     # identity of the empty prefix

LogprobRow = tuple[list[int], list[float], int]      # ids, values, rank of the first


def extend(prefix: int, token: int) -> int:
    """The identity of a prefix: what K/V at its last position depends on."""
    return hash((prefix, token))


def prefixes(tokens: list[int]) -> list[int]:
    """Identity of ``tokens[: i + 1]`` at i."""
    found, prefix = [], ROOT
    for token in tokens:
        prefix = extend(prefix, token)
        found.append(prefix)
    return found


def next_token(prefix: int, seed: int, num_output: int) -> int:
    """The token that the fake model samples after ``prefix``; it may be a stop id that comes too early to count."""
    return hash((prefix, seed, num_output)) % VOCAB


def logprob_row(prefix: int, token: int, num_best: int) -> LogprobRow:
    """What the fake model says of ``token`` after ``prefix``; values that float32 holds exactly."""
    ids = [token] + [(prefix + i) % VOCAB for i in range(num_best)]
    return ids, [float(-(prefix % 251) - i) for i in range(num_best + 1)], 1 + prefix % VOCAB


@dataclass(frozen=True)
class Wish:
    """One child request."""

    key: bytes
    child: int
    prompt: list[int]
    max_tokens: int
    seed: int                                        # nobody else's
    stop_ids: frozenset[int] = frozenset()
    eos_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    logprobs: int | None = None                      # best ones beside the token itself
    prompt_logprobs: int | None = None
    priority: int = 0
    kind: OutputKind = OutputKind.DELTA
    interval: int = 1                                # tokens
    cache_salt: bytes | None = None
    attach_no: int = 0
    forced: list[int] = field(default_factory=list)  # output it arrives with
    continues: bool = False                          # another's prompt and output, which ended on a block boundary

    @property
    def all_stop_ids(self) -> frozenset[int]:
        return self.stop_ids | self.eos_ids

    @property
    def params(self) -> TokenParams:
        return TokenParams(
            max_tokens=self.max_tokens, min_tokens=self.min_tokens, stop_token_ids=i32_bytes(sorted(self.stop_ids)),
            eos_token_ids=i32_bytes(sorted(self.eos_ids)), logprobs=self.logprobs, prompt_logprobs=self.prompt_logprobs)

    def expected(self) -> list[int]:
        """All output tokens."""
        prefix, output = prefixes(self.prompt)[-1], []
        while len(output) < self.max_tokens:
            token = next_token(prefix, self.seed, len(output))
            output.append(token)
            if token in self.all_stop_ids and len(output) >= self.min_tokens:
                break
            prefix = extend(prefix, token)
        return output

    def expected_logprobs(self, output: list[int]) -> list[LogprobRow]:
        """One row for each token of ``output``."""
        known = prefixes(self.prompt + output)[len(self.prompt) - 1:]
        return [logprob_row(prefix, token, self.logprobs) for prefix, token in zip(known, output)]

    def expected_prompt_logprobs(self) -> list[LogprobRow]:
        """One row for each prompt token but the first."""
        return [logprob_row(prefix, token, self.prompt_logprobs) for prefix, token in zip(prefixes(self.prompt), self.prompt[1:])]
