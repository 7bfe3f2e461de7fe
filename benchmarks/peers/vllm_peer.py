"""vLLM's CPU build in bfloat16 or float32, prefix cache off.

By itself it keeps one core free of OpenMP threads; here it gets as many threads as the other
engines, unless ``own_binding`` asks for what it ships with.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from typing import Any

from json_lines import serve

STEP_TOKENS = 2048


class VLLM:
    """``LLM`` for lists of requests, its async engine for serving; made anew for another width."""

    llm = engine = None

    def load(self, checkpoint: str, threads: int, width: int, max_model_len: int, serving: bool, own_binding: bool = False,
             dtype: str = "bfloat16", **_: Any) -> dict[str, Any]:
        if not own_binding:     # read when vllm starts its worker
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:threads])
        import vllm

        self._unload()
        settings = dict(model=checkpoint, dtype=dtype, max_model_len=max_model_len, max_num_seqs=width,
                        max_num_batched_tokens=max(STEP_TOKENS, width), enable_prefix_caching=False)
        if serving:
            self.loop = asyncio.new_event_loop()
            self.engine = self.loop.run_until_complete(self._start(settings))
        else:
            self.llm = vllm.LLM(**settings)
        return {"version": vllm.__version__, "precision": dtype, "binding": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")}

    def run(self, prompts: list[list[int]], output_tokens: list[int], one_by_one: bool) -> dict[str, Any]:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = [self._params(count) for count in output_tokens]
        started_s = time.perf_counter()
        if one_by_one:
            outputs = [self.llm.generate(x, p, use_tqdm=False)[0] for x, p in zip(inputs, params)]
        else:
            outputs = self.llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - started_s
        token_ids = [list(output.outputs[0].token_ids) for output in outputs]
        return {"seconds": seconds, "counts": [len(ids) for ids in token_ids], "token_ids": token_ids}

    def serve(self, prompts: list[list[int]], output_tokens: list[int], due_s: list[float]) -> dict[str, Any]:
        return {"times_s": self.loop.run_until_complete(self._serve(prompts, output_tokens, due_s))}

    async def _start(self, settings: dict[str, Any]) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))

    async def _serve(self, prompts: list[list[int]], output_tokens: list[int], due_s: list[float]) -> list[list[float]]:
        self.runs = getattr(self, "runs", 0) + 1
        started_s = time.perf_counter()

        async def one(i: int) -> list[float]:
            await asyncio.sleep(max(0.0, due_s[i] - (time.perf_counter() - started_s)))
            times_s: list[float] = []
            async for output in self.engine.generate({"prompt_token_ids": prompts[i]}, self._params(output_tokens[i]), f"{self.runs}-{i}"):
                now_s = time.perf_counter() - started_s
                times_s += [now_s] * (len(output.outputs[0].token_ids) - len(times_s))
            return times_s

        return await asyncio.gather(*(one(i) for i in range(len(prompts))))

    def _params(self, count: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(temperature=0, ignore_eos=True, max_tokens=count, detokenize=False)

    def _unload(self) -> None:
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
        if self.engine is not None:
            self.engine.shutdown()
        self.llm = self.engine = None
        gc.collect()


if __name__ == "__main__":
    serve(VLLM())
