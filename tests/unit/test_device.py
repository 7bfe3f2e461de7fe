"""Device, threads and KV memory: what is asked, what the machine and its container leave."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from gpu_worker import cgroup, device
from gpu_worker.attention.interface import AttentionLayer
from gpu_worker.device import DeviceError, choose_device, choose_threads, size_kv
from gpu_worker.models.spec import ModelSpec
from protocol.config import SchedulerConfig

LAYERS = tuple(AttentionLayer(index, 4, 2, 8, 1.0) for index in range(3))
SPEC = ModelSpec("llama", "decoder", LAYERS, 32, 257, 1000, torch.float32, (2,), True)
BLOCK_BYTES = 2 * 3 * 2 * 8 * 32 * 4
MUCH = 1 << 40


def test_cuda_that_is_absent_is_refused() -> None:
    if torch.cuda.is_available():
        assert choose_device("auto").type == choose_device("cuda").type == "cuda"
    else:
        assert choose_device("auto").type == "cpu"
        with pytest.raises(DeviceError, match="device: was 'cuda'.*allowed: 'auto' or 'cpu'"):
            choose_device("cuda")
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize(("quota", "expected"), [(None, 6), (3.7, 3), (0.5, 1), (64.0, 6)])
def test_threads_from_affinity_and_quota(monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(6)))
    monkeypatch.setattr(cgroup, "cpu_quota", lambda: quota)
    assert choose_threads(None) == expected and choose_threads(9) == 9


def test_kv_of_whole_requests() -> None:
    size = size_kv(SPEC, SchedulerConfig(max_num_seqs=5), None, MUCH)
    assert (size.num_blocks, size.max_model_len) == (5 * 32, 1000)       # ceil(1000 / 32) blocks each
    assert size_kv(SPEC, SchedulerConfig(max_num_seqs=5), 100, MUCH).num_blocks == 5 * 4


def test_kv_of_forty_percent() -> None:
    assert size_kv(SPEC, SchedulerConfig(max_num_seqs=64), None, 100 * BLOCK_BYTES).num_blocks == 40


def test_given_numbers_win() -> None:
    assert size_kv(SPEC, SchedulerConfig(num_kv_blocks=77), None, MUCH).num_blocks == 77
    assert size_kv(SPEC, SchedulerConfig(kv_cache_memory_bytes=90 * BLOCK_BYTES - 1), None, MUCH).num_blocks == 89


def test_max_model_len_is_lowered_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        size = size_kv(SPEC, SchedulerConfig(num_kv_blocks=7), None, MUCH)
    assert size.max_model_len == 7 * 32
    assert "max_model_len is lowered from 1000 to 224" in caplog.text


@pytest.mark.parametrize(("scheduler", "free", "message"), [
    (SchedulerConfig(num_kv_blocks=9, kv_cache_memory_bytes=10), MUCH, "num_kv_blocks: was 9 beside kv_cache_memory_bytes = 10"),
    (SchedulerConfig(num_kv_blocks=9), 8 * BLOCK_BYTES, "num_kv_blocks: was 9, .* at most 8"),
    (SchedulerConfig(kv_cache_memory_bytes=BLOCK_BYTES - 1), MUCH, f"kv_cache_memory_bytes: was {BLOCK_BYTES - 1}; allowed: at least {BLOCK_BYTES}"),
    (SchedulerConfig(kv_cache_memory_bytes=3 * BLOCK_BYTES), 2 * BLOCK_BYTES, "kv_cache_memory_bytes: was .* at most"),
    (SchedulerConfig(), 2 * BLOCK_BYTES, "one KV block takes")])
def test_memory_that_is_not_there_is_refused(scheduler: SchedulerConfig, free: int, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        size_kv(SPEC, scheduler, None, free)


def test_available_memory_is_bounded_by_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "memory_left_bytes", lambda: 12345)
    assert device.available_bytes(torch.device("cpu")) == 12345
    monkeypatch.setattr(cgroup, "memory_left_bytes", lambda: None)
    assert device.available_bytes(torch.device("cpu")) > 12345


def write(path: Path, **files: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)


def test_cgroup_version_2_takes_the_tightest_level(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/outer/inner\n")
    root = tmp_path / "fs"
    write(root / "outer" / "inner", cpu__max="max 100000\n", memory__max="max\n", memory__current="500\n")
    write(root / "outer", cpu__max="150000 100000\n", memory__max="10000\n", memory__current="7000\n",
          memory__stat="anon 4000\ninactive_file 2500\nactive_file 500\n")
    assert cgroup.cpu_quota(root, membership) == 1.5
    assert cgroup.memory_left_bytes(root, membership) == 10000 - 7000 + 2500


def test_cgroup_version_1(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("4:memory:/box\n3:cpu,cpuacct:/box\n0::/\n")
    root = tmp_path / "fs"
    write(root / "cpu" / "box", **{"cpu__cfs_quota_us": "250000\n", "cpu__cfs_period_us": "100000\n"})
    write(root / "cpu", **{"cpu__cfs_quota_us": "-1\n", "cpu__cfs_period_us": "100000\n"})
    write(root / "memory" / "box", memory__limit_in_bytes="9000\n", memory__usage_in_bytes="1000\n", memory__stat="total_inactive_file 100\n")
    write(root / "memory", memory__limit_in_bytes="9223372036854771712\n", memory__usage_in_bytes="1000\n")
    assert cgroup.cpu_quota(root, membership) == 2.5
    assert cgroup.memory_left_bytes(root, membership) == 8100


def test_no_cgroup_limits_nothing(tmp_path: Path) -> None:
    assert cgroup.cpu_quota(tmp_path, tmp_path / "absent") is None
    assert cgroup.memory_left_bytes(tmp_path, tmp_path / "absent") is None
