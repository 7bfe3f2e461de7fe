"""The run directory: found, locked before any bind, left empty."""

import os

import pytest

from protocol.config import EngineConfig
from protocol.progress import COUNTERS, PAGE_BYTES, TEXTS, ProgressPage, State
from protocol.run_dir import RunDir, RunDirError, locate


def test_located_by_argument_environment_default(tmp_path, monkeypatch):
    monkeypatch.setenv("FOLOVLLM_RUN_DIR", str(tmp_path / "from_environment"))
    assert locate(str(tmp_path / "given")).path == tmp_path / "given"
    assert locate().path == tmp_path / "from_environment"
    monkeypatch.delenv("FOLOVLLM_RUN_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert locate().path == tmp_path / "folovllm" / "default"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("FOLOVLLM_CACHE_DIR", str(tmp_path / "cache"))
    assert locate().path == tmp_path / "cache" / "run" / "default"


def test_second_engine_is_refused_and_disturbs_nothing(tmp_path):
    run_dir = RunDir(tmp_path / "engine")
    lock = run_dir.create_and_lock()
    run_dir.core_socket.touch()
    with pytest.raises(RunDirError, match=f"in use by the engine with pid {os.getpid()}"):
        RunDir(tmp_path / "engine").create_and_lock()
    assert run_dir.core_socket.exists()
    lock.release()
    assert not run_dir.path.exists()
    RunDir(tmp_path / "engine").create_and_lock().release()


def test_leftovers_of_a_dead_engine_are_cleared(tmp_path):
    run_dir = RunDir(tmp_path / "engine")
    run_dir.path.mkdir(mode=0o700)
    for name in ("core.sock", "worker0.page", "config.json", "lock", "mine.txt"):
        (run_dir.path / name).touch()
    lock = run_dir.create_and_lock()
    assert sorted(p.name for p in run_dir.path.iterdir()) == ["lock", "mine.txt"]
    lock.release()
    assert [p.name for p in run_dir.path.iterdir()] == ["mine.txt"]


def test_unusable_directories_are_named(tmp_path):
    too_long = RunDir(tmp_path / ("x" * 120))
    with pytest.raises(RunDirError, match="socket paths of"):
        too_long.create_and_lock()
    open_to_all = RunDir(tmp_path / "open")
    open_to_all.path.mkdir()
    open_to_all.path.chmod(0o755)
    with pytest.raises(RunDirError, match="mode 755; it must be 700"):
        open_to_all.create_and_lock()
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match="cannot create"):
        RunDir(tmp_path / "file" / "below").create_and_lock()


def test_config_goes_through_the_directory(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.write_config(EngineConfig(model_dir="/m"))
    assert run_dir.read_config() == EngineConfig(model_dir="/m")
    with pytest.raises(RunDirError, match=f"cannot write {tmp_path / 'missing' / 'config.json'}: No such file"):
        RunDir(tmp_path / "missing").write_config(EngineConfig())


def test_progress_page_is_read_by_others(tmp_path):
    page = ProgressPage.create(tmp_path / "worker0.page", "worker", 0, 3, 4)
    for i, name in enumerate(COUNTERS):
        page.set(name, i * 2**33 - 1)
    page.set("state", State.READY)
    for name in TEXTS:
        page.set_text(name, name * 300 if name == "note" else f"ä {name}")
    page.add("tokens", 5)
    reader = ProgressPage(tmp_path / "worker0.page")
    for i, name in enumerate(COUNTERS):
        expected = {"state": State.READY, "tokens": i * 2**33 + 4}.get(name, i * 2**33 - 1)
        assert reader.get(name) == expected, name
    assert reader.get_text("role") == "ä role"
    assert reader.get_text("note").startswith("notenote") and reader.get_text("note").endswith("…")
    assert os.stat(tmp_path / "worker0.page").st_blocks * 512 >= PAGE_BYTES      # a full disk shows here, not at a later write
    page.close()
