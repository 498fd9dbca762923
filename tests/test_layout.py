"""The import rules of the packages and the calls that are forbidden everywhere, checked on the syntax trees."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from itertools import takewhile
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
    "torch": (
        "learner/",
        "actors/weights/adapters.py",
        "actors/engine/cpu_kernels.py",
        "actors/weights/device_tensors.py",
        "actors/weights/device_loader.py",
        "actors/engine/engine.py",
        "actors/engine/environment.py",
        "actors/weights/vllm_loader.py",
    ),
    "vllm": (
        "actors/engine/cpu_kernels.py",
        "actors/engine/cpu_memory.py",
        "actors/weights/device_loader.py",
        "actors/engine/engine.py",
        "actors/engine/shortcuts.py",
        "actors/engine/thread.py",
        "actors/weights/vllm_loader.py",
        "actors/weights/vllm_worker.py",
        "learner/weights/nccl_group.py",
    ),
    "deepspeed": ("learner/distributed/deepspeed_engine.py",),
    "zmq": (
        "buffer/transport/credentials.py",
        "buffer/transport/authenticator.py",
        "buffer/transport/router.py",
        "buffer/transport/connection.py",
        "buffer/weights/server.py",
    ),
    "pickle": (),
    "marshal": (),
    "shelve": (),
    "dill": (),
    "cloudpickle": (),
    "joblib": (),
    "jsonpickle": (),
    "_pickle": (),
    "ray": (),
}

ORDER = {
    "buffer": ("service", "ledger", "weights", "transport"),
    "verifier": ("scoring", "rewards", "mathematics"),
    "actors": ("rollouts", "engine", "tasks", "weights"),
    "actors/tasks": ("text", "games", "datasets"),
    "learner": ("algorithms", "monitoring", "checkpoints", "distributed", "models", "batches", "weights"),
    "launch": ("processes", "terminal", "config"),
}
"""The subfolders of each folder, in order: none imports one before it."""
MOST_FILES = 12
"""Most files in one folder, without `__init__.py`."""
MAY_HOLD_MORE = ("verifier/mathematics",)

FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
}
ONLY_CALLED_IN = {
    # A thread started elsewhere could die unnoticed. The verifier imports no other package; its threads end their own
    # process or fail the calls of their pool.
    "threading.Thread": ("buffer/process.py", "verifier/scoring/pool.py", "verifier/scoring/client.py"),
    "threading.Timer": (),
    "Thread": (),
    "_thread.start_new_thread": (),
    # The futures of these have readers; `tests/buffer/test_threads.py` and `tests/learner` say who.
    "ThreadPoolExecutor": (
        "actors/rollouts/episode.py",
        "buffer/ledger/ledger_file.py",
        "buffer/service/server.py",
        "buffer/weights/versions.py",
        "learner/batches/prefetch.py",
        "learner/weights/device_store.py",
        "learner/weights/store.py",
    ),
}
"""Calls that only these files may make."""
FORBIDDEN_METHODS = {"recv_pyobj", "send_pyobj", "read_pickle", "to_pickle", "unsafe_load"}
"""Methods that are forbidden on any object: they pickle, or execute what they read."""
REQUIRED_ARGUMENTS = {"torch.load": ("weights_only", True)}
FORBIDDEN_ARGUMENTS = {"shell": True, "allow_pickle": True, "weights_only": False, "trust_remote_code": True}
"""Arguments that are forbidden in any call: with them it executes its input."""


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    """Returns (top-level package, line) of every import, also inside functions."""
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
    """The name of a called function: `f` for f(...), `a.f` for a.f(...); empty for other calls."""
    function = node.func
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return f"{function.value.id}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else ""


def complaints(name: str, source: str) -> list[str]:
    """The rules that a file breaks; `name` is its path relative to the root."""
    package, tree, found = Path(name).parts[0], ast.parse(source), []
    for module, line in imports(tree):
        if module == "a relative import":
            found.append(f"{name}:{line} imports relatively")
        if module in PACKAGES and module not in MAY_IMPORT[package]:
            found.append(f"{name}:{line} imports {module}; {package} may import {sorted(MAY_IMPORT[package])}")
        if module in ONLY_IN and not name.startswith(ONLY_IN[module] or ("-",)):
            found.append(f"{name}:{line} imports {module}; only {ONLY_IN[module] or 'nobody'} may")
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for node in calls:
        if name not in ONLY_CALLED_IN.get(called(node), (name,)):
            found.append(f"{name}:{node.lineno} calls {called(node)}; use buffer.process.start_thread")
    return found + [f"{name}:{node.lineno} {unsafe(node)}" for node in calls if unsafe(node)]


def unsafe(node: ast.Call) -> str:
    """Says what is dangerous about a call; empty when nothing is."""
    method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    if called(node) in FORBIDDEN_CALLS or method in FORBIDDEN_METHODS:
        return f"calls {called(node) or method}"
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    for argument, value in FORBIDDEN_ARGUMENTS.items():
        # Only a constant other than the forbidden one is safe; a variable may have the forbidden value.
        if argument in given and not (isinstance(given[argument], ast.Constant) and given[argument].value is not value):
            return f"passes {argument}={ast.unparse(given[argument])}"
    argument, value = REQUIRED_ARGUMENTS.get(called(node), ("", None))
    if argument and argument not in given:
        return f"calls {called(node)} without {argument}={value}"
    return ""


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_keeps_the_rules(package: str):
    assert files(package), f"{package} holds no module"
    broken = [c for path in files(package) for c in complaints(path.relative_to(ROOT).as_posix(), path.read_text())]
    assert broken == []


def test_no_module_has_a_standard_librarys_name():
    """A module directly in a package would hide one of the standard library from a script in that folder."""
    modules = [path for package in PACKAGES for path in (ROOT / package).iterdir() if not path.name.startswith("_")]
    shadowing = [path for path in modules if path.stem in sys.stdlib_module_names]
    assert shadowing == []
    assert not set(PACKAGES) & sys.stdlib_module_names


def imported_modules(source: str) -> set[str]:
    """The full names of the project's modules that a source imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name for name in inner if is_module(name)} or {node.module}
    return {name for name in names if name.split(".")[0] in PACKAGES}


def is_module(name: str) -> bool:
    return (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()


def upward(folder: str, name: str, source: str) -> list[str]:
    """The imports of a file in `folder` from subfolders that stand before its own in ORDER."""
    order, subfolder = ORDER[folder], name.removeprefix(f"{folder}/").split("/")[0]
    if subfolder not in order:
        return []
    above = {f"{folder}/{other}".replace("/", ".") for other in order[: order.index(subfolder)]}
    return [module for module in imported_modules(source) if any(f"{module}.".startswith(f"{a}.") for a in above)]


@pytest.mark.parametrize("folder", ORDER)
def test_no_folder_imports_one_that_stands_above_it(folder: str):
    assert sorted(ORDER[folder]) == sorted(path.parent.name for path in (ROOT / folder).glob("*/__init__.py"))
    names = {path: path.relative_to(ROOT).as_posix() for path in files(folder)}
    broken = {name: found for path, name in names.items() if (found := upward(folder, name, path.read_text()))}
    assert broken == {}


def test_the_order_finds_what_breaks_it():
    source = "def f():\n    from learner.algorithms.losses import policy_loss"
    assert upward("learner", "learner/models/head.py", source) == ["learner.algorithms.losses"]
    assert upward("learner", "learner/algorithms/grpo.py", source) == []
    assert upward("learner", "learner/train.py", source) == []
    assert upward("actors/tasks", "actors/tasks/datasets/data.py", "import actors.tasks.text.multiply") != []


def test_no_module_imports_itself_on_a_way_round():
    modules = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): imported_modules(path.read_text())
        for package in PACKAGES
        for path in files(package)
    }
    TopologicalSorter(modules).prepare()


def test_a_folder_holds_at_most_a_dozen_files():
    folders = [ROOT / top for top in (*PACKAGES, "benchmarks")]
    folders += [path for top in folders for path in top.rglob("*") if path.is_dir() and path.name != "__pycache__"]
    held = {
        folder.relative_to(ROOT).as_posix(): sum(
            path.is_file() and path.name != "__init__.py" for path in folder.iterdir()
        )
        for folder in folders
    }
    assert {name: count for name, count in held.items() if count > MOST_FILES and name not in MAY_HOLD_MORE} == {}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("buffer/x.py", "from actors.engine.engine import Engine"),
        ("buffer/x.py", "import zmq"),
        ("verifier/x.py", "import buffer.transport.messages"),
        ("actors/actor.py", "def f():\n    import learner.train"),
        ("actors/actor.py", "import torch.nn"),
        ("actors/actor.py", "import importlib\nimportlib.import_module('vllm.engine')"),
        ("learner/x.py", "from verifier import base"),
        ("learner/checkpoints/checkpoint.py", "import deepspeed"),
        ("learner/x.py", "from . import losses"),
        ("buffer/x.py", "import pickle"),
        ("launch/x.py", "eval('1')"),
        ("launch/x.py", "import yaml\nyaml.load(text)"),
        ("learner/x.py", "import torch\ntorch.load(path)"),
        ("learner/x.py", "import torch\ntorch.load(path, weights_only=False)"),
        ("learner/x.py", "import torch\ntorch.load(path, weights_only=flag)"),
        ("learner/x.py", "numpy.load(path, allow_pickle=True)"),
        ("launch/x.py", "import subprocess\nsubprocess.run(line, shell=True)"),
        ("launch/x.py", "os.system(line)"),
        ("buffer/x.py", "socket.recv_pyobj()"),
        ("actors/x.py", "import cloudpickle"),
        ("actors/x.py", "threading.Thread(target=run).start()"),
        ("buffer/x.py", "self._thread = Thread(target=run)"),
        ("learner/x.py", "pool = ThreadPoolExecutor(1)"),
    ],
)
def test_the_rules_find_what_breaks_them(name: str, source: str):
    assert len(complaints(name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("learner/x.py", "import torch\nfrom buffer.transport.messages import decode"),
        ("actors/engine/engine.py", "import torch, vllm"),
        ("launch/x.py", "from learner.config import LearnerConfig\nmodel.eval()"),
        ("learner/x.py", "import torch\ntorch.load(path, weights_only=True)"),
        ("launch/x.py", "import subprocess\nsubprocess.run(words)"),
        ("launch/x.py", "re.compile(text)"),
        ("buffer/transport/connection.py", "import zmq"),
    ],
)
def test_the_rules_allow_what_they_should(name: str, source: str):
    assert complaints(name, source) == []


def contributing_table(head: str) -> dict[str, set[str]]:
    """Reads the table of CONTRIBUTING.md with this head: the names in a row's second cell, by its first cell."""
    lines = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    rows = takewhile(lambda line: line.startswith("|"), lines[lines.index(head) + 2 :])
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {first.strip("`"): set(re.findall("`([^`]+)`", second)) for first, second in cells}


def test_contributing_states_the_rules_that_are_kept():
    assert contributing_table("| package | may import |") == MAY_IMPORT
    libraries = contributing_table("| library | only in |")
    for library, folders in libraries.items():
        assert folders == {name if name.endswith("/") else f"{Path(name).parent}/" for name in ONLY_IN[library]}
    # A library that is not in the table may be imported nowhere.
    assert {library for library, places in ONLY_IN.items() if places} == set(libraries)
