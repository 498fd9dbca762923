"""Checks docs/walk.md against the code: every file, function, class and message that the page names must exist.

The code is read as syntax trees and not imported.
"""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "walk.md"
MESSAGES = "buffer/transport/messages.py"
FEWEST_PLACES = 40

PLACE = re.compile(r"`([\w./-]+\.py)`\s`([A-Za-z_][\w.]*)`")
"""A file and a name in it: `FILE` `NAME`."""
FILE = re.compile(r"`([\w./-]+\.py)`")
OTHER_PATH = re.compile(r"`((?!RUN_DIR/)[\w./-]+(?:\.yaml|/))`")
"""A YAML file or a folder of the sources, but not of a run directory."""
MESSAGE = re.compile(r"(?<!\.py`\s)`((?:[A-Z][a-z]+)+)`")
"""A class without a file before it."""


@cache
def body(file: str) -> tuple[ast.stmt, ...]:
    """The statements of a file; none when it does not exist."""
    path = ROOT / file
    return tuple(ast.parse(path.read_text(encoding="utf-8")).body) if path.is_file() else ()


def names(statement: ast.stmt) -> list[str]:
    """The names that a statement defines: a function, a class, a constant or a field."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def defines(file: str, dotted: str) -> bool:
    """Whether `file` defines `dotted`, such as `Trainer._publish`, itself: what a class inherits does not count."""
    scope = body(file)
    for part in dotted.split("."):
        found = [statement for statement in scope if part in names(statement)]
        if not found:
            return False
        scope = tuple(found[-1].body) if isinstance(found[-1], ast.ClassDef) else ()
    return True


def complaints(text: str) -> list[str]:
    """The names of a page that do not exist in the code, or that are not in the page's form."""
    places = PLACE.findall(text)
    wrong = [f"`{file}`: no such file" for file in FILE.findall(text) if not (ROOT / file).is_file()]
    wrong += [f"`{file}` `{name}`: the file has no such name" for file, name in places if not defines(file, name)]
    wrong += [f"`{file}`: no name follows" for file in FILE.findall(PLACE.sub("", text))]
    wrong += [f"`{path}`: no such path" for path in OTHER_PATH.findall(text) if not (ROOT / path).exists()]
    wrong += [f"`{name}`: no message of {MESSAGES}" for name in MESSAGE.findall(text) if not defines(MESSAGES, name)]
    return sorted(set(wrong))


def test_everything_the_page_names_is_there() -> None:
    assert complaints(PAGE.read_text(encoding="utf-8")) == []


def test_the_page_names_enough() -> None:
    places = PLACE.findall(PAGE.read_text(encoding="utf-8"))
    assert len(set(places)) >= FEWEST_PLACES, f"only {len(set(places))} places were found in {PAGE}"


def test_hops_are_numbered_without_a_gap() -> None:
    """Each walk is one section, and the numbers go on through its tables."""
    walks = [s for s in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M) if s.startswith("One ")]
    assert len(walks) == 2
    for walk in walks:
        hops = [int(number) for number in re.findall(r"^\| (\d+) \|", walk, flags=re.M)]
        assert hops == list(range(1, len(hops) + 1)), walk.splitlines()[0]


def test_what_is_wrong_is_found() -> None:
    assert complaints("`learner/nowhere.py` `Trainer`") == [
        "`learner/nowhere.py` `Trainer`: the file has no such name",
        "`learner/nowhere.py`: no such file",
    ]
    # `PPO` inherits `loss`, and `advantages` is not a function of the module.
    for name in ("PPO.loss", "advantages", "PPO.advantages.batch"):
        assert complaints(f"`learner/algorithms/ppo.py` `{name}`") == [
            f"`learner/algorithms/ppo.py` `{name}`: the file has no such name"
        ]
    assert complaints("see `learner/train.py` for it") == ["`learner/train.py`: no name follows"]
    assert complaints("in `configs/nothing/` and `configs/no.yaml`") == [
        "`configs/no.yaml`: no such path",
        "`configs/nothing/`: no such path",
    ]
    assert complaints("a `LeaseWish`") == [f"`LeaseWish`: no message of {MESSAGES}"]


def test_what_is_right_is_let_through() -> None:
    for place in (
        "`learner/train.py` `Trainer._publish`",
        "`buffer/config.py` `BufferConfig.max_staleness`",
        "`actors/tasks/task.py` `GENERATED`",
        "`buffer/transport/messages.py` `Message`",
        "`actors/actor.py` `Actor._deliver`",
        "a `LeaseRequest` with `RUN_DIR/config.yaml`, `updates_per_batch` and `configs/task/`",
    ):
        assert complaints(place) == []
