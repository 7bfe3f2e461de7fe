"""transformers' ``generate`` in bfloat16 or float32, one request after another.

Runs in the engine's own environment, which has transformers already.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from json_lines import serve


class Transformers:
    """One model; width makes no difference."""

    def load(self, checkpoint: str, threads: int, dtype: str = "bfloat16", **_: Any) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
        return {"version": transformers.__version__, "precision": dtype, "torch": torch.__version__}

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], output_tokens: list[int], one_by_one: bool) -> dict[str, Any]:
        started_s, token_ids = time.perf_counter(), []
        for prompt, count in zip(prompts, output_tokens):
            ids = torch.tensor([prompt])
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count,
                                      eos_token_id=None, pad_token_id=0)
            token_ids.append(out[0, len(prompt):].tolist())
        return {"seconds": time.perf_counter() - started_s, "counts": [len(ids) for ids in token_ids], "token_ids": token_ids}


if __name__ == "__main__":
    serve(Transformers())
