"""Mutation tests of the learner's equations: `python -m tests.mutation learner/algorithms/losses.py ...`

Each mutant is a copy of the project with one change: a sign, a comparison, a constant, the bound of a clip, a mask, or
a `detach`. The tests of the learner's equations run on every mutant until one of them fails. A mutant without a failing
test survives and is printed. The working tree is only read. This takes minutes, so it is not part of the test suite.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("learner", "buffer", "configs", "docs", "tests", "pyproject.toml", "CONTRIBUTING.md")
TESTS = (
    "losses",
    "advantages",
    "importance",
    "corrections",
    "metrics",
    "algorithms",
    "algorithm_advantages",
    "invariance",
    "examples",
)
LIMIT_SECONDS = 120.0
PRELOADED = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
SWAPPED: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
RENAMED = {"minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min", "zeros_like": "ones_like"}
DROPPED = {"detach", "clamp", "exp", "sqrt", "rsqrt", "square", "abs", "cumsum", "sum", "flatten"}
"""Methods whose call is replaced by its object: `x.detach()` becomes `x`."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    """The file, relative to the root."""
    line: int
    change: str
    """The code before and after, for the report."""
    source: str
    """The whole changed file."""


def mutants(path: str, source: str) -> Iterator[Mutant]:
    """Yields a mutant for every alternative of every node of `source`."""
    tree = ast.parse(source)
    for number, node in enumerate(ast.walk(tree)):
        for index in range(len(alternatives(node))):
            changed = copy.deepcopy(tree)
            target = list(ast.walk(changed))[number]
            before = ast.unparse(target)
            replacement = alternatives(target)[index]
            if id(target) in not_mutated(changed):
                continue
            replace_node(changed, target, replacement)
            text = ast.unparse(ast.fix_missing_locations(changed))
            yield Mutant(path, target.lineno, f"{before}  ->  {ast.unparse(replacement)}", text)


def not_mutated(tree: ast.AST) -> set[int]:
    """The ids of nodes that belong to no equation: annotations, decorators, raise statements and f-strings."""
    found: set[int] = set()
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.args, *node.args.kwonlyargs]
            parts = [node.returns, *node.decorator_list, *(argument.annotation for argument in arguments)]
        elif isinstance(node, ast.AnnAssign):
            parts = [node.annotation]
        elif isinstance(node, ast.Raise | ast.JoinedStr):
            parts = [node]
        found |= {id(inner) for part in parts if part is not None for inner in ast.walk(part)}
    return found


def alternatives(node: ast.AST) -> list[ast.expr]:
    """The replacements of `node`."""
    found: list[ast.expr] = []
    if isinstance(node, ast.BinOp):
        found = [with_field(node, "op", kind()) for kind in SWAPPED.get(type(node.op), ())]
        if isinstance(node.op, ast.Mult):
            # Each factor alone as well, because the other one may be a mask.
            found += [node.left, node.right]
    elif isinstance(node, ast.BoolOp):
        found = [with_field(node, "op", kind()) for kind in SWAPPED[type(node.op)]]
    elif isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            for kind in SWAPPED.get(type(operator), ()):
                found.append(with_field(node, "ops", [*node.ops[:place], kind(), *node.ops[place + 1 :]]))
    elif isinstance(node, ast.UnaryOp):
        found = [node.operand]
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        found = [ast.Constant(not node.value)]
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        found = [ast.Constant(node.value + 1), ast.Constant(node.value - 1)]
    elif isinstance(node, ast.IfExp):
        found = [with_field(node, "test", ast.UnaryOp(ast.Not(), node.test))]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        found = call_alternatives(node, node.func)
    return [ast.copy_location(one, node) for one in found]


def call_alternatives(node: ast.Call, function: ast.Attribute) -> list[ast.expr]:
    """The replacements of a method call, or of a call such as `torch.where(...)`."""
    found: list[ast.expr] = []
    if function.attr == "where":
        found += [node.args[1], node.args[2]]
    if function.attr in RENAMED and not node.keywords:
        found.append(with_field(node, "func", with_field(function, "attr", RENAMED[function.attr])))
    if function.attr in DROPPED:
        found.append(function.value)
    if function.attr == "clamp" and len(node.args) == 2:
        found += [with_field(node, "args", [ast.Constant(None), node.args[1]]), with_field(node, "args", node.args[:1])]
    return found


def with_field(node: ast.expr, name: str, value: object) -> ast.expr:
    """A copy of `node` with one field changed."""
    changed = copy.copy(node)
    setattr(changed, name, value)
    return changed


def replace_node(tree: ast.AST, target: ast.AST, replacement: ast.expr) -> None:
    """Replace `target` in its parent, wherever that is in `tree`."""
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is target:
                setattr(parent, name, replacement)
            elif isinstance(value, list):
                setattr(parent, name, [replacement if item is target else item for item in value])


@cache
def project_copy(parent: Path, pid: int) -> Path:
    """Copies the project to a folder in `parent`, once for the worker process `pid`; returns the folder."""
    folder = parent / str(pid)
    folder.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, folder / name)
    return folder


def is_killed(parent: Path, mutant: Mutant) -> bool:
    """Whether a test fails, or the tests hang, with `mutant` written to this worker's copy of the project."""
    folder = project_copy(parent, os.getpid())
    original = (ROOT / mutant.path).read_text()
    (folder / mutant.path).write_text(mutant.source)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = run_tests(folder, Path(mutant.path).stem)
        finally:
            os._exit(status)
    try:
        return wait(pid) != 0
    finally:
        (folder / mutant.path).write_text(original)


def wait(pid: int) -> int:
    """Returns the exit status of a child process; 1 when it had to be killed.

    Waits for: the child. Gives up after: `LIMIT_SECONDS`.
    """
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return 1


def run_tests(folder: Path, first: str) -> int:
    """Runs the tests of the equations in `folder`; returns pytest's exit status.

    Args:
        folder: a copy of the project.
        first: the module whose tests run first.
    """
    import hypothesis
    import pytest

    class Quick:
        def pytest_collection(self) -> None:
            # This hook runs after conftest.py has loaded its profile. Any failing example is enough: do not shrink it.
            phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
            hypothesis.settings.register_profile(
                "mutants", phases=phases, max_examples=40, deadline=None, database=None
            )
            hypothesis.settings.load_profile("mutants")

    os.chdir(folder)
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    sys.dont_write_bytecode = True
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    files = [test_file(folder, name) for name in sorted(TESTS, key=lambda name: name != first)]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-W", PRELOADED]
    return int(pytest.main([*options, *(str(file) for file in files if file.exists())], plugins=[Quick()]))


def test_file(folder: Path, name: str) -> Path:
    """The file with the tests of a module."""
    return folder / "tests" / "learner" / "algorithms" / f"test_{name}.py"


def preload() -> None:
    """Import the libraries that every child process needs, but nothing of the project, which mutants change."""
    import hydra.utils  # noqa: F401
    import hypothesis.strategies  # noqa: F401
    import pytest  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2ForCausalLM  # noqa: F401

    torch.set_num_threads(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every survivor and the share of killed mutants. Returns 0 when the share is at least `--least`."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("paths", nargs="+", help="files to mutate, relative to the root")
    parser.add_argument("--workers", type=int, default=1, help="number of mutants that are tested at the same time")
    parser.add_argument("--least", type=float, default=0.95, help="smallest share of killed mutants for exit status 0")
    parser.add_argument("--lines", default="", help="FIRST-LAST: only mutants in these lines")
    options = parser.parse_args(arguments)
    preload()
    first, _, last = options.lines.partition("-")
    made = [mutant for path in options.paths for mutant in mutants(path, (ROOT / path).read_text())]
    made = [mutant for mutant in made if not first or int(first) <= mutant.line <= int(last)]
    unchanged = [Mutant(path, 0, "", (ROOT / path).read_text()) for path in options.paths]
    with tempfile.TemporaryDirectory(prefix="mutants-") as parent:
        is_mutant_killed = partial(is_killed, Path(parent))
        if any(map(is_mutant_killed, unchanged)):
            parser.error("the tests fail without any change; repair them first")
        killed = []
        with ProcessPoolExecutor(options.workers, mp_context=get_context("fork")) as pool:
            for mutant, dead in zip(made, pool.map(is_mutant_killed, made), strict=True):
                killed.append(dead)
                if not dead:
                    print(f"survived: {mutant.path}:{mutant.line}: {mutant.change}", flush=True)
    for path in options.paths:
        fates = [dead for mutant, dead in zip(made, killed, strict=True) if mutant.path == path]
        print(f"{path}: {sum(fates)} of {len(fates)} mutants killed")
    share = sum(killed) / max(len(killed), 1)
    print(f"all: {sum(killed)} of {len(killed)} mutants killed, {share:.1%}")
    return int(share < options.least)


if __name__ == "__main__":
    sys.exit(main())
