"""The check at start: what depends on the rows beside it is found; the verdict is remembered."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpu_worker import self_check
from gpu_worker.attention.interface import AttentionLayer, AttentionMetadata, StepAttention
from gpu_worker.attention.reference import ReferenceAttention
from gpu_worker.kv_cache import KVCache
from gpu_worker.models.kernel_parts import KernelLinear
from gpu_worker.models.layers import Linear, packs
from gpu_worker.models.registry import load_model
from gpu_worker.models.spec import LoadedModel, ModelSpec
from gpu_worker.quantization.products import QuantizedLinear
from gpu_worker.row_buckets import RowBuckets
from gpu_worker.self_check import HEAD_BATCHES, ROW_COUNTS, attention_faults, product_faults
from gpu_worker.startup import load_worker
from protocol.config import EngineConfig, ModelConfig, SchedulerConfig
from private_cache import use_private_cache
from tiny_models import write_gpt_neox, write_tiny_llama

CPU = torch.device("cpu")
PADDED = [4, 8, 64, 160, 512]
LAYERS = tuple(AttentionLayer(index, 4, 2, 16, 0.25, window) for index, window in enumerate((None, 16, None)))
SPEC = ModelSpec("llama", "decoder", LAYERS, 64, 257, 1000, torch.float32, (2,), True)
Change = Callable[[Tensor, Tensor], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_private_cache(monkeypatch, tmp_path / "cache") / "self_check"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other by spinning are slow beside other programs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Changed:
    """A product whose result ``change(x, result)`` spoils."""

    def __init__(self, change: Change, out_features: int = 24, kind: str = "plain") -> None:
        weight = torch.randn(out_features, 40, generator=torch.Generator().manual_seed(1))
        self._linear, self._change = Linear(weight), change
        self.in_features, self.out_features, self.input_dtype, self.kind, self.integers = 40, out_features, torch.float32, kind, None
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        result = self._linear(x)
        self._change(x, result)
        return result


def unchanged(_x: Tensor, _result: Tensor) -> None:
    pass


def one_ulp(values: Tensor) -> None:
    values.copy_(torch.nextafter(values, torch.tensor(torch.inf)))


def few_rows(x: Tensor, result: Tensor) -> None:
    if len(x) < 4:
        one_ulp(result[0, 3:4])


def remainder_rows(x: Tensor, result: Tensor) -> None:
    one_ulp(result[len(x) // 48 * 48:, -1] if len(x) > 64 else result[:0])


def neighbours(x: Tensor, result: Tensor) -> None:
    if bool(x.isnan().any()):
        result *= 1 + 2**-23


class Model:
    """Products and attention without a model around them."""

    def __init__(self, linears: list[Changed], spec: ModelSpec = SPEC) -> None:
        self.spec, self.attention, self.weights_fingerprint = spec, ReferenceAttention(), "weights"
        self._linears = linears

    def linears(self) -> list[Changed]:
        return self._linears

    def head(self) -> Changed:
        return self._linears[0]


def check(model: object, fingerprint: str = "f", padded: bool = True, max_num_seqs: int = 8) -> self_check.Verdict:
    return self_check.self_check(model, RowBuckets(padded), fingerprint, max_num_seqs)


def test_the_buckets_are_the_agreed_ones() -> None:
    assert sorted({RowBuckets().bucket(count) for count in ROW_COUNTS}) == PADDED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_good_product_has_no_fault(dtype: torch.dtype) -> None:
    if not packs(dtype, CPU):
        pytest.skip(f"{dtype} products are not packed here, and not promised")
    weight = torch.randn(576, 1536, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert product_faults(Linear(weight), PADDED) == []


@pytest.mark.parametrize(("change", "wrong"), [(remainder_rows, [160, 512]), (neighbours, [160, 512])])
def test_row_dependent_product_is_found(change: Change, wrong: list[int]) -> None:
    faults = product_faults(Changed(change), PADDED)
    assert [int(fault.split()[-1]) for fault in faults] == wrong
    assert all("40 x 24 weights" in fault for fault in faults)


def test_product_that_needs_padding_fails_without() -> None:
    assert check(Model([Changed(few_rows)])).bit_exact
    verdict = check(Model([Changed(few_rows)]), padded=False, fingerprint="without")
    assert not verdict.bit_exact
    assert {reason.split()[-1] for reason in verdict.reasons} == {"1", "2", "3"}


def test_every_shape_is_looked_at() -> None:
    linears = [Changed(unchanged), Changed(unchanged, 8), Changed(unchanged, 8), Changed(remainder_rows, 16)]
    verdict = check(Model(linears))
    assert not verdict.bit_exact and all("40 x 16" in reason for reason in verdict.reasons)
    assert sorted(linear.calls > 0 for linear in linears) == [False, True, True, True]     # equal shapes once


def test_every_kind_of_weight_is_looked_at() -> None:
    """Of one shape: what the first finds says nothing of the second."""
    for linears in ([Changed(unchanged), Changed(remainder_rows, kind="other")], [Changed(remainder_rows, kind="other"), Changed(unchanged)]):
        model = Model([Changed(unchanged), *linears])
        verdict = check(model, fingerprint=linears[0].kind)
        assert not verdict.bit_exact and all(linear.calls for linear in linears)


def quantized_llama(path: Path, mode: str) -> LoadedModel:
    return load_model(write_tiny_llama(path, head_dim=16), dtype="auto", device=CPU, quantization=mode, num_threads=1)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(("mode", "kinds"), [("int8", 2), ("int4", 2)])
@pytest.mark.parametrize("most", [1, 2**15])
def test_integer_products_that_saturate_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, kinds: int, kernels: bool, most: int) -> None:
    """By one product of each kernel whose sums are as large as they get; the model's own are small."""
    monkeypatch.setenv("FOLOVLLM_DISABLE_KERNELS", "0" if kernels else "1")
    model = quantized_llama(tmp_path / "model", mode)
    product = type(model.head())
    assert product is (KernelLinear if kernels else QuantizedLinear)
    assert check(model) == self_check.Verdict(True, [])
    right = product.__call__
    monkeypatch.setattr(product, "__call__", lambda self, x: right(self, x).clamp(-most, most))
    verdict = check(model, "saturating")
    assert not verdict.bit_exact and len(verdict.reasons) == kinds
    assert all(reason.startswith("sums of the largest integers") for reason in verdict.reasons)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_kinds_tell_weights_and_rows_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, kernels: bool) -> None:
    monkeypatch.setenv("FOLOVLLM_DISABLE_KERNELS", "0" if kernels else "1")
    model = quantized_llama(tmp_path / "model", mode)
    kinds = [product.kind for product in (*model.linears()[:4], model.head())]
    qkv, output, gate_up, down, head = kinds
    assert qkv == output == gate_up and (down != qkv, head != qkv) == ((True, False) if mode == "int8" else (False, True)), kinds


def test_head_is_looked_at_for_as_many_rows_as_it_meets() -> None:
    head, other = Changed(remainder_rows), Changed(unchanged)
    model = Model([head, other])
    model.linears = lambda: [other]
    assert check(model, max_num_seqs=64).bit_exact
    assert not check(model, max_num_seqs=512).bit_exact


@pytest.mark.parametrize(("size", "seen"), [(1, 16), (2, 32), (4, 64), (5, 64), (8, 64), (64, 64)])
def test_head_meets_every_row_from_four_rows_on(size: int, seen: int) -> None:
    calls: list[list[float]] = []            # what stands first in each row
    product_faults(Changed(lambda x, _: calls.append(x[:, 0].tolist())), [size], most_batches=HEAD_BATCHES)
    assert len({value for row in calls[1:] for value in row}) == seen and len(calls) <= 1 + HEAD_BATCHES


def test_not_a_number_equals_itself() -> None:
    def spoil(_x: Tensor, result: Tensor) -> None:
        result[:, 5] = float("nan")

    assert product_faults(Changed(spoil), PADDED) == []


class Wrong:
    """The reference attention, spoilt where ``when(metadata)``."""

    name = "wrong"

    def __init__(self, when: Callable[[AttentionMetadata], bool]) -> None:
        self._when = when

    def begin(self, metadata: AttentionMetadata, kv: KVCache) -> StepAttention:
        step, spoilt = ReferenceAttention().begin(metadata, kv), self._when(metadata)

        class Spoilt:
            def attend(self, *arguments: object) -> Tensor:
                result = step.attend(*arguments)
                if spoilt:
                    one_ulp(result[:, 0])
                return result

        return Spoilt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_attention_has_no_fault(dtype: torch.dtype) -> None:
    assert attention_faults(ReferenceAttention(), dataclasses.replace(SPEC, dtype=dtype), RowBuckets()) == []


@pytest.mark.parametrize(("when", "circumstances"), [
    (lambda metadata: len(metadata.query_lens_host) > 1, ["among others", "in chunks among others"]),
    (lambda metadata: 1 in metadata.query_lens_host, ["in chunks", "among others", "in chunks among others"]),
    (lambda metadata: bool((metadata.block_table[:, 0] > 40).any()), ["among others", "in chunks among others"])])
def test_wrong_attention_is_found(when: Callable[[AttentionMetadata], bool], circumstances: list[str]) -> None:
    faults = attention_faults(Wrong(when), SPEC, RowBuckets())
    assert [fault.split("tokens differ ")[1] for fault in faults] == circumstances * 2      # two kinds of layers


def test_verdict_is_remembered_by_fingerprint(cache: Path) -> None:
    assert check(Model([Changed(unchanged)])).bit_exact
    memo, = cache.iterdir()
    assert json.loads(memo.read_text()) == {"bit_exact": True, "reasons": []}
    later = Changed(remainder_rows)
    assert check(Model([later])).bit_exact and later.calls == 0
    assert not check(Model([later]), "another").bit_exact
    assert check(Model([later]), "another") == check(Model([Changed(unchanged)]), "another")     # a bad one too


@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe", b"[]", b'{"bit_exact": true}', b'{"bit_exact": 1, "reasons": []}',
                                     b'{"bit_exact": true, "reasons": []', b"[" * 100_000])
def test_corrupted_verdict_is_ignored(cache: Path, content: bytes) -> None:
    model = Model([Changed(remainder_rows)])
    found = check(model)
    memo, = cache.iterdir()
    memo.write_bytes(content)
    assert check(model) == found and not found.bit_exact
    assert json.loads(memo.read_text())["bit_exact"] is False


def test_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("a file where a directory should be")
    monkeypatch.setenv("FOLOVLLM_CACHE_DIR", str(tmp_path / "file"))
    assert check(Model([Changed(unchanged)])).bit_exact


def test_what_is_not_promised_is_not_claimed() -> None:
    product = Changed(unchanged)
    verdict = check(Model([product], dataclasses.replace(SPEC, supports_bit_exact=False)))
    assert not verdict.bit_exact and verdict.reasons and product.calls == 0


@pytest.fixture(scope="module")
def gpt_neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpt_neox(tmp_path_factory.mktemp("gpt_neox"))


def test_transformers_backend_is_checked_and_not_claimed(gpt_neox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: LoadedModel = load_model(gpt_neox, dtype="float32", device=CPU, num_threads=1)
    shapes = {(linear.out_features, linear.in_features) for linear in model.linears()}
    assert shapes == {(384, 128), (128, 128), (512, 128), (128, 512)} and model.head().out_features == 288
    verdict = check(model)
    assert not verdict.bit_exact
    assert verdict.reasons == ["not promised by the transformers backend, whose other operators are not checked"]
    monkeypatch.setattr(model, "head", lambda: Changed(remainder_rows))
    monkeypatch.setattr(model, "linears", lambda: [Changed(remainder_rows)])
    assert any("40 x 24" in reason for reason in check(model, "another").reasons)


def test_a_family_whose_head_is_found_through_its_base(tmp_path: Path) -> None:
    """Ours stands in for the base after loading, so the head must have been kept."""
    model = load_model(write_tiny_llama(tmp_path, hidden_act="relu"), dtype="float32", device=CPU, num_threads=1)
    assert model.spec.backend == "transformers"
    assert (model.head().out_features, model.head().in_features) == (257, 32)
    assert len(check(model).reasons) == 1


def test_worker_claims_what_was_found(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    config = EngineConfig(model=ModelConfig(dtype="float32", device="cpu", num_threads=1),
                          scheduler=SchedulerConfig(max_num_seqs=3), model_dir=str(tiny_llama_dir))
    monkeypatch.setenv("FOLOVLLM_DISABLE_KERNELS", "1")
    good = load_worker(config)
    assert good.bit_exact and not caplog.records
    monkeypatch.setattr("gpu_worker.startup.self_check", lambda *_: self_check.Verdict(False, ["rows differ"]))
    bad = load_worker(config)
    assert not bad.bit_exact and bad.numerics_fingerprint != good.numerics_fingerprint
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.WARNING, "outputs may depend on what else is in the batch: rows differ")]
