"""The founding document's end-to-end tests, on the default model and real processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from folovllm import BadRequest, LLMEngine, ModelConfig, SamplingParams, SchedulerConfig

QUESTIONS = ["What is the capital of France?", "Write a haiku about AI.", "Why is the sky blue?", "2 + 2 = ?"]


def greedy(max_tokens: int = 16, **more: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, **more)


@pytest.fixture(scope="module")
def engine(default_model_dir: Path) -> Iterator[LLMEngine]:
    with LLMEngine(ModelConfig(model="default"), SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=512), num_kv_blocks=512) as engine:
        yield engine


def test_generate_batch(engine: LLMEngine) -> None:
    outputs = engine.generate_batch(QUESTIONS, greedy())
    assert [output.prompt for output in outputs.values()] == QUESTIONS
    assert next(iter(outputs.values())).outputs[0].text == "The capital of France is Paris."
    assert all(output.finished and output.outputs[0].finish_reason in ("stop", "length") for output in outputs.values())


def test_more_prompts_than_rows(engine: LLMEngine) -> None:
    outputs = engine.generate_batch(QUESTIONS * 5, greedy(8))
    texts = [output.outputs[0].text for output in outputs.values()]
    assert len(texts) == 20 and texts == texts[:4] * 5


def test_different_lengths(engine: LLMEngine) -> None:
    prompts = [[1 + i % 1000 for i in range(length)] for length in (1, 2, 31, 32, 33, 64, 600)]
    outputs = engine.generate(prompts, greedy(5, ignore_eos=True))
    assert [len(output.prompt_token_ids) for output in outputs] == [1, 2, 31, 32, 33, 64, 600]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [5] * 7


def test_single_prompt(engine: LLMEngine) -> None:
    (output,) = engine.generate_batch(QUESTIONS[0], greedy()).values()
    assert output.outputs[0].text == "The capital of France is Paris."
    assert output.outputs[0].finish_reason == "stop"
    assert output.metrics.time_to_first_token_s > 0


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 40])
def test_max_tokens(engine: LLMEngine, max_tokens: int) -> None:
    (output,) = engine.generate("Once upon a time", greedy(max_tokens, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == max_tokens
    assert output.outputs[0].finish_reason == "length"


def test_max_tokens_of_each_request(engine: LLMEngine) -> None:
    params = [greedy(n, ignore_eos=True) for n in (3, 11, 5)]
    outputs = engine.generate(["a", "b", "c"], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 11, 5]


def test_batch_equals_sequential(engine: LLMEngine) -> None:
    params = greedy(24, logprobs=3)
    batch = engine.generate_batch(QUESTIONS, params).values()
    for question, together in zip(QUESTIONS, batch, strict=True):
        (alone,) = engine.generate_batch([question], params).values()
        assert alone.outputs[0].token_ids == together.outputs[0].token_ids
        assert [{i: p.logprob.hex() for i, p in row.items()} for row in alone.outputs[0].logprobs] == [
            {i: p.logprob.hex() for i, p in row.items()} for row in together.outputs[0].logprobs]


def test_sampling_parameters_act(engine: LLMEngine) -> None:
    def text(**params: object) -> str:
        return engine.generate("The weather today is", SamplingParams(max_tokens=12, **params))[0].outputs[0].text

    assert text(temperature=1.0, seed=1) == text(temperature=1.0, seed=1) != text(temperature=1.0, seed=2)
    assert text(temperature=0, allowed_token_ids=[30]) == "." * 12
    word = text(temperature=0).split()[0]
    assert word not in text(temperature=0, bad_words=[word])
    assert text(temperature=1.0, top_k=1, seed=3) == text(temperature=0)
    assert text(temperature=0, logit_bias={30: 100.0}) == "." * 12
    stopped = engine.generate("Count: 1 2 3 4", greedy(30, stop=[" 7"]))[0].outputs[0]
    assert (stopped.finish_reason, stopped.stop_reason, " 7" in stopped.text) == ("stop", " 7", False)


def test_n_continuations(engine: LLMEngine) -> None:
    (output,) = engine.generate("Once", SamplingParams(n=3, max_tokens=6, temperature=1.0, seed=5))
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({completion.text for completion in output.outputs}) == 3
    (first,) = engine.generate("Once", SamplingParams(max_tokens=6, temperature=1.0, seed=5))
    assert first.outputs[0].token_ids == output.outputs[0].token_ids


def test_prompt_logprobs(engine: LLMEngine) -> None:
    (output,) = engine.generate("The capital of France is Paris", greedy(1, prompt_logprobs=2))
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(output.prompt_token_ids)
    paris = output.prompt_logprobs[-1][output.prompt_token_ids[-1]]
    assert paris.rank == 1 and paris.decoded_token == " Paris"


def test_bad_input_disturbs_nobody(engine: LLMEngine) -> None:
    running = engine.stream("Once upon a time", greedy(40, ignore_eos=True))
    next(running)
    for prompt, params, field in (
            ([], greedy(), "prompt"), ([49152], greedy(), "prompt"), ([5] * 9000, greedy(), "prompt"),
            ("a", greedy(9000), "max_tokens"), ("a", greedy(allowed_token_ids=[60000]), "allowed_token_ids")):
        with pytest.raises(BadRequest) as caught:
            engine.generate([prompt], params)
        assert caught.value.field == field
    assert len(running.result().outputs[0].token_ids) == 40


def test_two_engines_side_by_side(engine: LLMEngine, default_model_dir: Path) -> None:
    with LLMEngine(model=str(default_model_dir), dtype="float32", num_kv_blocks=64, max_model_len=256) as second:
        assert second.generate_batch(QUESTIONS[0], greedy())["0"].outputs[0].text == "The capital of France is Paris."
    (output,) = engine.generate_batch(QUESTIONS[0], greedy()).values()
    assert output.outputs[0].text == "The capital of France is Paris."
