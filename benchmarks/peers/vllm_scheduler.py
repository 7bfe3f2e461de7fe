"""vLLM's own scheduler without a model: one decode step of it, schedule and update_from_output.

A child that answers JSON lines, under vLLM's Python.  Requests of 200 prompt tokens, prefix
cache on as it ships, no statistics.
"""

from __future__ import annotations

import os
import random
import time
from typing import Any

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
from json_lines import serve

BLOCK, PROMPT_TOKENS, MAX_MODEL_LEN, STEP_TOKENS = 16, 200, 8192, 8192


class VLLMScheduler:
    """Answers with the seconds of single steps."""

    def load(self, checkpoint: str) -> dict[str, Any]:
        import vllm

        self.checkpoint, self.scheduler, self.running = checkpoint, None, 0
        return {"version": vllm.__version__}

    def steps(self, running: int, count: int) -> dict[str, Any]:
        """``count`` decode steps of ``running`` requests."""
        if running != self.running or self._left() < count:
            self._fill(running)
        return {"seconds": [self._step() for _ in range(count)]}

    def _left(self) -> int:
        """Steps until the first request ends."""
        return min(request.max_tokens - request.num_output_tokens for request in self.scheduler.running) - 1

    def _fill(self, running: int) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        init_none_hash(sha256)
        self.scheduler, self.running, numbers = make_scheduler(self.checkpoint, running), running, random.Random(0)
        for i in range(running):
            self.scheduler.add_request(Request(
                request_id=str(i), prompt_token_ids=[numbers.randint(100, 40000) for _ in range(PROMPT_TOKENS)],
                sampling_params=SamplingParams(max_tokens=600, ignore_eos=True), pooling_params=None,
                block_hasher=get_request_block_hasher(BLOCK, sha256)))
        while not self._all_decode():
            self._step()

    def _all_decode(self) -> bool:
        requests = self.scheduler.running
        return len(requests) == self.running and all(r.num_computed_tokens > r.num_prompt_tokens for r in requests)

    def _step(self) -> float:
        from vllm.v1.outputs import ModelRunnerOutput

        started_s = time.perf_counter()
        plan = self.scheduler.schedule()
        first_s = time.perf_counter() - started_s
        ids = list(plan.num_scheduled_tokens)
        requests = [self.scheduler.requests[i] for i in ids]
        sampled = [[7] if r.num_computed_tokens >= r.num_prompt_tokens else [] for r in requests]
        result = ModelRunnerOutput(req_ids=ids, req_id_to_index={r: i for i, r in enumerate(ids)}, sampled_token_ids=sampled,
                                   logprobs=None, prompt_logprobs_dict={}, pooler_output=[])
        started_s = time.perf_counter()
        self.scheduler.update_from_output(plan, result)
        return first_s + time.perf_counter() - started_s


def make_scheduler(checkpoint: str, running: int) -> Any:
    """As vLLM's engine would make it."""
    import torch
    from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
    cache.num_gpu_blocks = running * 64 + 1000
    config = VllmConfig(
        model_config=ModelConfig(model=checkpoint, dtype="bfloat16", max_model_len=MAX_MODEL_LEN),
        scheduler_config=SchedulerConfig(max_num_seqs=running, max_num_batched_tokens=STEP_TOKENS, max_model_len=MAX_MODEL_LEN,
                                         enable_chunked_prefill=True, is_encoder_decoder=False),
        cache_config=cache)
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=3, head_size=64, dtype=torch.bfloat16)
    kv = KVCacheConfig(num_blocks=cache.num_gpu_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["l"], spec)])
    return Scheduler(vllm_config=config, kv_cache_config=kv, log_stats=False, structured_output_manager=StructuredOutputManager(config),
                     block_size=BLOCK)


if __name__ == "__main__":
    serve(VLLMScheduler())
