"""What children are told about threads: ours, with a word about what the user's environment had."""

import pytest

import launch
from protocol.thread_settings import replaced, with_own_threads

USERS = {"GOMP_SPINCOUNT": "infinity", "OMP_STACKSIZE": "256k", "OMP_NUM_THREADS": "1", "OMP_PROC_BIND": "close", "KMP_AFFINITY": "compact",
         "GOMP_CPU_AFFINITY": "0", "MKL_NUM_THREADS": "3", "MKL_DYNAMIC": "TRUE"}


@pytest.fixture
def users(monkeypatch):
    for name in replaced(dict(launch.os.environ)):
        monkeypatch.delenv(name)
    for name, value in USERS.items():
        monkeypatch.setenv(name, value)


def test_the_worker_gets_ours_alone(users, monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    env = launch.environment("worker")
    assert {name: env[name] for name in env if name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))} == {
        "GOMP_SPINCOUNT": "1000", "MKL_CBWR": "COMPATIBLE"}      # that one chooses an arithmetic


@pytest.mark.parametrize("role", ["core", "frontend", "resolver"])
def test_the_others_get_one_thread(users, role):
    env = launch.environment(role)
    assert {name: env[name] for name in env if name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_"))} == {
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def test_what_is_replaced_is_said_in_one_line(users, capsys):
    launch.say_replaced(launch.os.environ)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("folovllm: ") and "--num-threads" in said
    assert all(f"{name}={value}" in said for name, value in USERS.items())


@pytest.mark.parametrize("environ", [{}, {"PATH": "/bin", "MKL_CBWR": "AVX2"}, with_own_threads({}, "worker")])
def test_nothing_is_said_where_nothing_differs(environ, capsys):
    launch.say_replaced(environ)
    assert replaced(environ) == {} and capsys.readouterr().err == ""
