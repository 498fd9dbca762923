"""Runs one grader in a process of its own, with a deadline per answer.

A process that hangs or dies is replaced, and the item counts as a hang or a death.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SCRIPT = Path(__file__).resolve().parent / "graders.py"
START_SECONDS = 120.0
MAX_RESTARTS = 100

HANG, DIED, NOT_ASKED = "hang", "died", "not asked"


class Item(NamedTuple):
    """One completion to grade. It is correct when it equals one of the golds."""

    kind: str
    completion: str
    golds: Sequence[str]
    expected: bool
    format: str = "any"


class Outcome(NamedTuple):
    """The result of a grader for one item."""

    correct: bool | None
    """The verdict; None without one, for the reason in `problem`."""
    seconds: float
    cpu_seconds: float
    problem: str = ""
    """Empty, the text of an exception, HANG, DIED, or NOT_ASKED after too many restarts of the grader."""


@dataclass(frozen=True)
class Asked:
    """The results of one grader for a list of items."""

    release: str
    """Version of the grader's package; for ours the arithmetic backend of mpmath."""
    outcomes: list[Outcome]


class Unavailable(Exception):
    """The grader does not start with that Python; the text says why."""


def ask(
    name: str,
    python: str,
    items: Sequence[Item],
    deadline_seconds: float,
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Asked:
    """Grades every item; returns the outcomes in order.

    Args:
        name: the grader's name in `graders.py`.
        python: an interpreter with the grader's package.
        items: what to grade.
        deadline_seconds: time limit for one answer; past it the process is killed and replaced.
        environment: variables that are added to those of this process.
        folder: working directory of the grader; a temporary one by default.
        progress: called now and then with the number of items that are graded.

    Waits for: the start of the grader, at most `START_SECONDS`, and each answer, at most `deadline_seconds`.

    Raises:
        Unavailable: when the grader does not start.
    """
    outcomes: list[Outcome] = []
    release, num_restarts = "", 0
    with tempfile.TemporaryDirectory(prefix="bench-") as own:
        path = Path(own, "items.jsonl")
        path.write_text("".join(json.dumps([item.completion, list(item.golds), item.format]) + "\n" for item in items))
        while len(outcomes) < len(items):
            if num_restarts > MAX_RESTARTS:
                outcomes += [Outcome(None, 0.0, 0.0, NOT_ASKED)] * (len(items) - len(outcomes))
                break
            with _started(name, python, path, len(outcomes), environment or {}, folder or Path(own)) as lines:
                release = _release(lines)
                problem = _read(lines, outcomes, len(items), deadline_seconds, progress)
            if problem:
                spent = deadline_seconds if problem == HANG else 0.0
                outcomes.append(Outcome(None, spent, spent, problem))
                num_restarts += 1
    return Asked(release, outcomes)


def _read(
    lines: queue.Queue[str | None],
    outcomes: list[Outcome],
    num_items: int,
    deadline_seconds: float,
    progress: Callable[[int], None],
) -> str:
    """Appends answers to `outcomes`. Returns "" after the last one, or HANG or DIED when no further answer comes."""
    while len(outcomes) < num_items:
        try:
            line = lines.get(timeout=deadline_seconds)
        except queue.Empty:
            return HANG
        if line is None:
            return DIED
        correct, seconds, cpu_seconds, problem = json.loads(line)
        outcomes.append(Outcome(correct, seconds, cpu_seconds, problem))
        if len(outcomes) % 100 == 0:
            progress(len(outcomes))
    return ""


def _release(lines: queue.Queue[str | None]) -> str:
    try:
        line = lines.get(timeout=START_SECONDS)
    except queue.Empty:
        raise Unavailable(f"no answer within {START_SECONDS:.0f} s of its start") from None
    if line is None or not line.startswith("ready"):
        raise Unavailable((line or "it ended without a word").strip()[:200])
    return line.removeprefix("ready").strip()


@contextmanager
def _started(name: str, python: str, items: Path, start: int, environment: dict[str, str], folder: Path) -> Any:
    command = [python, str(SCRIPT), name, str(items), str(start)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=variables, cwd=folder, start_new_session=True
    ) as process:
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            yield lines
        finally:
            # The group includes the child processes that some graders start.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
            reader.join()


def _pump(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)
