"""When the library is compiled, and what is said where it cannot be: a compiler of our own stands in."""

import pytest
import torch

from gpu_worker.kernels import build as builder
from gpu_worker.kernels.build import LEVELS, KernelsUnavailable, best_level, build
from gpu_worker.kernels.library import Library
from gpu_worker.models.cpu_kernels import CpuKernels

AVX2 = LEVELS[-1]
WRITES_OUTPUT = 'while [ "$1" != -o ]; do shift; done; echo x > "$2"'


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Makes a shell script the compiler; returns what it has been called with so far."""
    monkeypatch.setenv("FOLOVLLM_CACHE_DIR", str(tmp_path / "cache"))
    log = tmp_path / "calls"

    def use(script):
        path = tmp_path / "compiler"
        path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "$*" >> {log}\n{script}\n', encoding="utf-8")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return lambda: log.read_text(encoding="utf-8").splitlines()

    return use


def test_compiled_once_and_found_again(compiler):
    calls = compiler(WRITES_OUTPUT)
    place = build(AVX2)
    assert place.is_file() and place.name.startswith("avx2-") and place.suffix == ".so"
    assert sorted(path.name for path in place.parent.iterdir()) == [".lock", place.name]      # nothing else is left
    assert place.parent.stat().st_mode & 0o777 == 0o700
    count = len(calls())
    assert count == 3 and all("-mavx2" in call for call in calls()[:-1])
    assert build(AVX2) == place and len(calls()) == count
    assert build(AVX2, ("-DOTHER",)) != place and build(LEVELS[0]) != place


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:1], lambda content: content[:-1], lambda content: content[:1] + b"!" + content[2:],
    lambda content: content + b"\n"])
def test_a_damaged_library_is_compiled_anew(compiler, damage):
    calls = compiler(WRITES_OUTPUT)
    place = build(AVX2)
    content, count = place.read_bytes(), len(calls())
    place.write_bytes(damage(content))
    assert build(AVX2) == place and place.read_bytes() == content and len(calls()) == 2 * count
    assert build(AVX2) == place and len(calls()) == 2 * count


def test_a_library_is_on_the_disk_before_it_has_its_name(compiler, monkeypatch):
    compiler(WRITES_OUTPUT)
    place = build(AVX2)
    place.unlink()
    flushed = []
    monkeypatch.setattr(builder, "flush", lambda path: flushed.append((path.name, [each.name for each in place.parent.glob("*.so")])))
    build(AVX2)
    assert flushed == [("kernels.so", []), ("kernels", [place.name])]


def test_a_library_that_cannot_be_opened_is_a_reason(compiler):
    """As on a file system that runs nothing; torch then does the work, and this is what is told."""
    compiler(WRITES_OUTPUT)
    with pytest.raises(KernelsUnavailable, match=r"avx.*\.so: file too short"):
        Library.open(AVX2)
    kernels, reason = CpuKernels.open(torch.device("cpu"), 1)
    assert kernels is None and "file too short" in reason


def test_what_a_killed_compile_left_is_cleared(compiler):
    compiler(WRITES_OUTPUT)
    place = build(AVX2)
    place.unlink()
    left_over = place.parent / ".building-killed"
    left_over.mkdir()
    (left_over / "attention.o").touch()
    build(AVX2)
    assert not left_over.exists()


def test_a_library_that_is_there_is_found_where_nothing_can_be_written(compiler, monkeypatch):
    compiler(WRITES_OUTPUT)
    place = build(AVX2)
    monkeypatch.setattr(builder, "taken", None)      # the lock is a file that is written
    assert build(AVX2) == place


def test_every_source_is_in_one_unit(compiler, tmp_path):
    """attention.cpp by itself, a file that includes all others."""
    compiler(f'for each; do case $each in *others.cpp) cp "$each" {tmp_path};; esac; done; {WRITES_OUTPUT}')
    build(AVX2)
    included = {line.split('"')[1] for line in (tmp_path / "others.cpp").read_text(encoding="utf-8").splitlines()}
    assert included == {str(path) for path in builder.SOURCES.glob("*.cpp")} - {str(builder.SOURCES / builder.LONGEST)}


def test_error_is_given_with_the_file(compiler):
    compiler(f'case "$*" in *others.cpp*) echo "kv.h:7: error: no such thing" >&2; exit 1;; esac; {WRITES_OUTPUT}')
    with pytest.raises(KernelsUnavailable, match=r"the kernels do not compile with .*: kv.h:7: error: no such thing"):
        build(AVX2)


def test_compiler_that_does_not_end_is_not_waited_for(compiler, monkeypatch):
    monkeypatch.setattr(builder, "TIMEOUT_S", 0.2)
    compiler("exec sleep 60")
    with pytest.raises(KernelsUnavailable, match="was not done after 0 s"):
        build(AVX2)


def test_no_compiler_is_said(compiler, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FOLOVLLM_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(KernelsUnavailable, match=r"no C\+\+ compiler was found"):
        build(AVX2)


@pytest.mark.parametrize("name", ["/nonexistent", "no-such-compiler", "/tmp"])
def test_a_compiler_asked_for_that_is_none_is_said(compiler, monkeypatch, tmp_path, name):
    """And no other one taken in its place."""
    monkeypatch.setenv("FOLOVLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", name)
    with pytest.raises(KernelsUnavailable, match=f"CXX: was '{name}'; allowed: the name or the path of a C.. compiler"):
        build(AVX2)


def test_a_compiler_that_cannot_be_run_is_said(compiler, tmp_path):
    compiler("")
    (tmp_path / "compiler").write_bytes(b"\x7fELF")
    with pytest.raises(KernelsUnavailable, match="compiler: Exec format error"):
        build(AVX2)


def test_cache_that_cannot_be_written_is_said(compiler, tmp_path):
    compiler(WRITES_OUTPUT)
    (tmp_path / "cache").write_text("a file where a directory should be")
    with pytest.raises(KernelsUnavailable, match="cache/kernels"):
        build(AVX2)


def test_level_is_the_best_that_the_cpu_has_in_full():
    for level in LEVELS:
        assert best_level(level.needs | {"sse2"}) is level
    assert best_level(LEVELS[1].needs - {"avx512dq"}) is AVX2
    with pytest.raises(KernelsUnavailable, match="this CPU lacks avx2, f16c"):
        best_level(frozenset(("fma", "sse2")))
