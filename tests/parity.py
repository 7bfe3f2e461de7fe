"""Our tokens and logits against ``transformers``: one teacher-forced forward a request.

Used by the parity tests.  At each position transformers must choose the token that we chose
(where its two best lie close together, either), from the same logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from in_process_engine import Continuation

TIE = 1e-4                                         # logits; closer ones than this are not told apart
Reference = Callable[[list[int], int], Tensor]     # token ids, n → float32 [n, vocab_size]: logits of the last n positions


@dataclass(frozen=True)
class Comparison:
    """What a set of requests came to."""

    largest_difference: float        # of any logit
    largest_in_std: float            # the same in standard deviations of the request's logits
    other_tokens: list[str]          # where transformers would have chosen another token


def transformers_reference(model_dir: Path) -> Reference:
    """The checkpoint in transformers, in float32, with attention written out."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager", local_files_only=True)
    model.eval()

    def logits_of(token_ids: list[int], count: int) -> Tensor:
        with torch.inference_mode():
            return model(torch.tensor([token_ids]), use_cache=False, logits_to_keep=count).logits[0]

    return logits_of


def compare(streams: list[Continuation], reference: Reference) -> Comparison:
    """Each stream's prompt and tokens, given to ``reference`` as a whole."""
    differences, in_std, others = [], [], []
    for stream in streams:
        count = len(stream.token_ids)
        expected = reference(stream.prompt + stream.token_ids[:-1], count)
        ours, chosen = torch.stack(stream.logits), torch.tensor(stream.token_ids)
        differences.append((ours - expected).abs().max())
        in_std.append(differences[-1] / expected.std())
        short = expected.amax(-1) - expected.gather(1, chosen[:, None])[:, 0]     # of the best logit
        others += [f"prompt of {len(stream.prompt)} tokens, output {at}: token {chosen[at]} is {short[at]:.2g} below the best"
                   for at in torch.nonzero(~(short < TIE)).flatten().tolist()]
        assert torch.equal(ours.argmax(-1), chosen)
    return Comparison(float(torch.stack(differences).max()), float(torch.stack(in_std).max()), others)
