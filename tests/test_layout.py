"""The import rules of the packages, read from their syntax trees: what may import what, and what nobody may call."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("buffer", "verifier", "actors", "learner", "launch")

MAY_IMPORT = {
    "buffer": {"buffer"},
    "verifier": {"verifier"},
    "actors": {"actors", "buffer", "verifier"},
    "learner": {"learner", "buffer"},
    "launch": set(PACKAGES),
}

ONLY_IN = {
    "torch": ("learner/", "actors/engine.py", "actors/weights.py"),
    "vllm": ("actors/engine.py", "actors/weights.py"),
    "deepspeed": ("learner/engine.py",),
    "zmq": ("buffer/server.py", "buffer/client.py", "learner/publisher.py"),
    "pickle": (),
    "marshal": (),
    "shelve": (),
    "ray": (),
}

FORBIDDEN_CALLS = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pickle.loads", "pickle.load"}


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    """The first name of every imported module, with its line; also inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(("a relative import" if node.level else str(node.module).split(".")[0], node.lineno))
        elif isinstance(node, ast.Call) and called(node) in {"__import__", "importlib.import_module", "import_module"}:
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant):
                found.append((str(argument.value).split(".")[0], node.lineno))
    return found


def called(node: ast.Call) -> str:
    """`f` for f(...), `a.f` for a.f(...), else nothing."""
    function = node.func
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return f"{function.value.id}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else ""


def complaints(name: str, source: str) -> list[str]:
    """What the file `name`, relative to the root, breaks."""
    package, tree, found = Path(name).parts[0], ast.parse(source), []
    for module, line in imports(tree):
        if module == "a relative import":
            found.append(f"{name}:{line} imports relatively")
        if module in PACKAGES and module not in MAY_IMPORT[package]:
            found.append(f"{name}:{line} imports {module}; {package} may import {sorted(MAY_IMPORT[package])}")
        if module in ONLY_IN and not name.startswith(ONLY_IN[module] or ("-",)):
            found.append(f"{name}:{line} imports {module}; only {ONLY_IN[module] or 'nobody'} may")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called(node) in FORBIDDEN_CALLS:
            found.append(f"{name}:{node.lineno} calls {called(node)}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_keeps_the_rules(package: str):
    assert files(package), f"{package} holds no module"
    broken = [c for path in files(package) for c in complaints(path.relative_to(ROOT).as_posix(), path.read_text())]
    assert broken == []


def test_no_module_has_a_standard_librarys_name():
    modules = [path for package in PACKAGES for path in files(package) if not path.stem.startswith("__")]
    shadowing = [path for path in modules if path.stem in sys.stdlib_module_names]
    assert shadowing == []
    assert not set(PACKAGES) & sys.stdlib_module_names


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("buffer/x.py", "from actors.engine import Engine"),
        ("buffer/x.py", "import zmq"),
        ("verifier/x.py", "import buffer.wire"),
        ("actors/actor.py", "def f():\n    import learner.train"),
        ("actors/actor.py", "import torch.nn"),
        ("actors/actor.py", "import importlib\nimportlib.import_module('vllm.engine')"),
        ("learner/x.py", "from verifier import base"),
        ("learner/checkpoint.py", "import deepspeed"),
        ("learner/x.py", "from . import losses"),
        ("buffer/x.py", "import pickle"),
        ("launch/x.py", "eval('1')"),
        ("launch/x.py", "import yaml\nyaml.load(text)"),
    ],
)
def test_the_rules_find_what_breaks_them(name: str, source: str):
    assert len(complaints(name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("learner/x.py", "import torch\nfrom buffer.wire import decode"),
        ("actors/engine.py", "import torch, vllm"),
        ("launch/x.py", "from learner.config import LearnerConfig\nmodel.eval()"),
        ("buffer/client.py", "import zmq"),
    ],
)
def test_the_rules_allow_what_they_should(name: str, source: str):
    assert complaints(name, source) == []
