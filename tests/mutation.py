"""Do the tests notice when an equation is broken? `python -m tests.mutation learner/algorithms/losses.py ...`

Changes one thing at a time in a copy of the project (a sign, a comparison, a constant, a clip's bound, a mask, a stop
of the gradient) and runs the tests of the learner's equations until one fails. Prints the mutants that none noticed.
The working tree is only read. Not part of the test suite: it takes minutes.
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
COPIED = ("learner", "buffer", "configs", "docs", "tests", "pyproject.toml")
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
"""Methods whose call is replaced by what they are called on."""


@dataclass(frozen=True)
class Mutant:
    """One changed file."""

    path: str
    line: int
    change: str
    source: str


def mutants(path: str, source: str) -> Iterator[Mutant]:
    """Every change of one node of `source`."""
    tree = ast.parse(source)
    for number, node in enumerate(ast.walk(tree)):
        for index in range(len(alternatives(node))):
            changed = copy.deepcopy(tree)
            target = list(ast.walk(changed))[number]
            before = ast.unparse(target)
            replacement = alternatives(target)[index]
            if id(target) in silent(changed):
                continue
            put(changed, target, replacement)
            text = ast.unparse(ast.fix_missing_locations(changed))
            yield Mutant(path, target.lineno, f"{before}  ->  {ast.unparse(replacement)}", text)


def silent(tree: ast.AST) -> set[int]:
    """Nodes whose change no equation is: annotations, decorators, docstrings, and what an error message says."""
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
    """What may stand in place of `node`."""
    found: list[ast.expr] = []
    if isinstance(node, ast.BinOp):
        found = [with_field(node, "op", kind()) for kind in SWAPPED.get(type(node.op), ())]
        if isinstance(node.op, ast.Mult):
            # A factor may be a mask.
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
    """Of a call of a method or of a function of torch."""
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


def put(tree: ast.AST, target: ast.AST, replacement: ast.expr) -> None:
    """Replace `target` where it hangs in `tree`."""
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is target:
                setattr(parent, name, replacement)
            elif isinstance(value, list):
                setattr(parent, name, [replacement if item is target else item for item in value])


@cache
def own_copy(parent: Path, pid: int) -> Path:
    """This worker's copy of the project, in `parent`."""
    folder = parent / str(pid)
    folder.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, folder / name)
    return folder


def is_killed(parent: Path, mutant: Mutant) -> bool:
    """Whether a test fails, or nothing ends, with `mutant` in place of a copy made in `parent`."""
    folder = own_copy(parent, os.getpid())
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
    """The exit status of a child, 1 when it has to be killed."""
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
    """The tests of the equations in `folder`, those of the module `first` before the others."""
    import hypothesis
    import pytest

    class Quick:
        def pytest_collection(self) -> None:
            # After conftest.py has chosen its own. A failure is enough; its smallest example is of no use here.
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
    there = [name for name in sorted(TESTS, key=lambda name: name != first) if test_file(folder, name).exists()]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-W", PRELOADED]
    return int(pytest.main([*options, *(str(test_file(folder, name)) for name in there)], plugins=[Quick()]))


def test_file(folder: Path, name: str) -> Path:
    """Where the tests of a module stand."""
    return folder / "tests" / "learner" / "algorithms" / f"test_{name}.py"


def preload() -> None:
    """What every child would import anew; nothing of ours."""
    import hydra.utils  # noqa: F401
    import hypothesis.strategies  # noqa: F401
    import pytest  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2ForCausalLM  # noqa: F401

    torch.set_num_threads(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the share of killed mutants and every survivor. Returns 0 when at least `--least` of them are killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("paths", nargs="+", help="files, relative to the root")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--least", type=float, default=0.95, help="share of mutants that must be killed")
    parser.add_argument("--lines", default="", help="FIRST-LAST: only mutants in these lines")
    options = parser.parse_args(arguments)
    preload()
    first, _, last = options.lines.partition("-")
    made = [mutant for path in options.paths for mutant in mutants(path, (ROOT / path).read_text())]
    made = [mutant for mutant in made if not first or int(first) <= mutant.line <= int(last)]
    unchanged = [Mutant(path, 0, "", (ROOT / path).read_text()) for path in options.paths]
    with tempfile.TemporaryDirectory(prefix="mutants-") as parent:
        killed_there = partial(is_killed, Path(parent))
        if any(map(killed_there, unchanged)):
            parser.error("the tests fail without any change; mend them first")
        killed = []
        with ProcessPoolExecutor(options.workers, mp_context=get_context("fork")) as pool:
            for mutant, dead in zip(made, pool.map(killed_there, made), strict=True):
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
