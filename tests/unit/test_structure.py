"""What the layout promises: who imports whom, how large a file and a function may be."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("protocol", "core_proc", "gpu_worker", "frontend")
SOURCES = sorted(path for pattern in ("*.py", *(f"{p}/**/*.py" for p in (*PACKAGES, "tests", "benchmarks", "examples")))
                 for path in ROOT.glob(pattern))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
TORCH = {"torch", "transformers"}
UNSAFE = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """Top-level names of everything that the file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def may_use_zmq(path: str) -> bool:
    return (path.endswith("/process.py") or path.startswith(("tests/", "benchmarks/"))
            or path in ("frontend/client.py", "frontend/client_connection.py", "frontend/engine_client.py",
                        "protocol/transport.py"))


def test_there_is_something_to_look_at():
    assert {relative(path).split("/")[0] for path in SOURCES} >= {*PACKAGES, "tests", "launch.py", "folovllm.py"}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports(path):
    name, used = relative(path), imports(path)
    package = name.split("/")[0]
    assert not used & UNSAFE
    if package in PACKAGES:
        allowed = {package, "protocol"}
        assert not used & (set(PACKAGES) - allowed), f"{name} imports {used & (set(PACKAGES) - allowed)}"
        assert not used & {"launch", "folovllm", "multiprocessing"}
        if package != "gpu_worker":
            assert not used & TORCH
    if name == "launch.py":
        assert not used & ((set(PACKAGES) - {"protocol"}) | TORCH)
    if "zmq" in used:
        assert may_use_zmq(name)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_sizes(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION_LINES, f"{node.name} in {relative(path)}"


@pytest.mark.parametrize("path", [p for p in SOURCES if relative(p).split("/")[0] in (*PACKAGES, "launch.py")], ids=relative)
def test_every_module_says_what_it_is(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert not re.search(r"torch\.load\(|allow_pickle=True", path.read_text(encoding="utf-8"))


def test_dependencies_are_the_agreed_ones():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.match(r"[a-z0-9-]+", entry)[0] for entry in project["dependencies"]}
    assert names == {"torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy", "pyzmq", "msgspec", "psutil",
                     "jinja2", "rich"}
    assert "torch==2.13.0" in project["dependencies"]
