"""OpenVINO GenAI as it ships: 4-bit weights from the GGUF file, int8 activations, u8 KV cache.

Its continuous batching pipeline, prefix cache off.  ``prompt_lookup`` is its own speculation.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
from json_lines import serve

CACHE_GB = 4
STEP_TOKENS = 2048
LOOKUP_TOKENS, LOOKUP_NGRAM = 5, 3      # drafts a step, longest n-gram: the values of its own sample


class OpenVINO:
    """One pipeline, made anew for another width."""

    def load(self, gguf: str, threads: int, width: int, prompt_lookup: bool = False, **_: Any) -> dict[str, Any]:
        self.pipeline, self.prompt_lookup = None, prompt_lookup
        config = genai.SchedulerConfig()
        config.max_num_seqs, config.max_num_batched_tokens, config.cache_size = width, STEP_TOKENS, CACHE_GB
        config.enable_prefix_caching, config.dynamic_split_fuse = False, True
        properties = {"INFERENCE_NUM_THREADS": threads} | ({"prompt_lookup": True} if prompt_lookup else {})
        self.pipeline = genai.ContinuousBatchingPipeline(gguf, config, "CPU", properties)
        capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return {"version": genai.get_version(), "precision": "the file's 4-bit weights, int8 activations, u8 KV cache",
                "cpu": " ".join(capabilities)}

    def run(self, prompts: list[list[int]], output_tokens: list[int], one_by_one: bool) -> dict[str, Any]:
        inputs = [tensor(prompt) for prompt in prompts]
        configs = [self.generation(count) for count in output_tokens]
        started_s = time.perf_counter()
        if one_by_one:
            results = [self.pipeline.generate([x], [config])[0] for x, config in zip(inputs, configs)]
        else:
            results = self.pipeline.generate(inputs, configs)
        seconds = time.perf_counter() - started_s
        token_ids = [[int(token) for token in result.m_generation_ids[0]] for result in results]
        return {"seconds": seconds, "counts": [len(ids) for ids in token_ids], "token_ids": token_ids}

    def serve(self, prompts: list[list[int]], output_tokens: list[int], due_s: list[float]) -> dict[str, Any]:
        """Requests enter between two steps, once they are due: no later than the pipeline could take them."""
        work = [(due, tensor(p), self.generation(n)) for due, p, n in zip(due_s, prompts, output_tokens)]
        times_s: list[list[float]] = [[] for _ in work]
        open_handles: dict[int, Any] = {}
        started_s, entered = time.perf_counter(), 0
        while entered < len(work) or open_handles:
            now_s = time.perf_counter() - started_s
            while entered < len(work) and work[entered][0] <= now_s:
                _, ids, config = work[entered]
                open_handles[entered] = self.pipeline.add_request(entered, ids, config)
                entered += 1
            if not open_handles:
                time.sleep(max(0.0, work[entered][0] - now_s))
                continue
            self.pipeline.step()
            now_s = time.perf_counter() - started_s
            for i, handle in list(open_handles.items()):
                if handle.can_read():
                    times_s[i] += [now_s] * len(handle.read()[0].generated_ids)
                if len(times_s[i]) >= output_tokens[i]:
                    del open_handles[i]
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        return {"times_s": times_s}

    def generation(self, count: int) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample, config.apply_chat_template = count, True, False, False
        if self.prompt_lookup:
            config.num_assistant_tokens, config.max_ngram_size = LOOKUP_TOKENS, LOOKUP_NGRAM
        return config


def tensor(ids: list[int]) -> Any:
    return openvino.Tensor(np.array([ids], dtype=np.int64))


if __name__ == "__main__":
    serve(OpenVINO())
