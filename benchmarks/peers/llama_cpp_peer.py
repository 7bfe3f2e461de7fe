"""llama.cpp through xllamacpp, the prebuilt wheel with its server in the process.

The GGUF file as it is.  The server's slots batch what its threads hand in; prompt cache off.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp
from json_lines import serve


class LlamaCpp:
    """One server, made anew for another width."""

    def load(self, gguf: str, threads: int, width: int, max_model_len: int, **_: Any) -> dict[str, Any]:
        self.server, self.width = None, width
        params = xllamacpp.CommonParams()
        params.model.path = gguf
        params.n_parallel, params.n_ctx = width, width * max_model_len
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_prompt, params.cache_ram_mib, params.verbosity = False, 0, 0
        self.server = xllamacpp.Server(params)
        return {"version": xllamacpp.__version__, "precision": "the file's 4-bit weights, int8 activations, f16 KV cache",
                "cpu": xllamacpp.get_system_info().strip()}

    def run(self, prompts: list[list[int]], output_tokens: list[int], one_by_one: bool) -> dict[str, Any]:
        with ThreadPoolExecutor(1 if one_by_one else self.width) as pool:
            started_s = time.perf_counter()
            results = list(pool.map(lambda i: self.server.handle_completions(request(prompts[i], output_tokens[i])), range(len(prompts))))
            seconds = time.perf_counter() - started_s
        return {"seconds": seconds, "counts": [result["usage"]["completion_tokens"] for result in results], "token_ids": None}

    def serve(self, prompts: list[list[int]], output_tokens: list[int], due_s: list[float]) -> dict[str, Any]:
        times_s: list[list[float]] = [[] for _ in prompts]
        started_s = time.perf_counter()

        def one(i: int) -> None:
            time.sleep(max(0.0, due_s[i] - (time.perf_counter() - started_s)))
            self.server.handle_completions(request(prompts[i], output_tokens[i]) | {"stream": True},
                                           lambda _: times_s[i].append(time.perf_counter() - started_s))

        threads = [threading.Thread(target=one, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"times_s": [times[:count] for times, count in zip(times_s, output_tokens)]}    # the last chunk only says the end


def request(prompt: list[int], count: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False, "stream": False}


if __name__ == "__main__":
    serve(LlamaCpp())
