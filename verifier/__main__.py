"""`python -m verifier check` grades a file of completions, prints tables, and lists the disagreements.

A disagreement is a verdict that differs from the file's label, or from the verdict of the grader in `--against`.

Exit status: 0 without disagreements, 1 with disagreements, 2 with one sentence for a mistake in the arguments or the
file, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from verifier.base import RewardSpec, Score, Verdict
from verifier.check import Fields, Report, grade, read_rows, report, reward_spec, task_reward


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m verifier", description="Grade completions.")
    _add_check(parser.add_subparsers(dest="command", required=True))
    options = parser.parse_args(arguments)
    try:
        return _check(options)
    except (ValueError, RuntimeError) as error:
        print(f"verifier: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = commands.add_parser("check", help="grade a file of completions; print tables and the disagreements")
    graded_by = check.add_mutually_exclusive_group(required=True)
    graded_by.add_argument("--task", help="grade by the reward list of configs/task/TASK.yaml")
    graded_by.add_argument("--reward", help="grade by this grader: a name, FILE.py:NAME, or {name: ..., options: ...}")
    check.add_argument("--against", help="compare with this grader's verdicts instead of the file's labels")
    check.add_argument("--data", required=True, type=Path, help="file of JSON lines, each with a completion and a gold")
    defaults = Fields()
    for name, meaning in (
        ("completion", f"name of the field with the completion; default {defaults.completion}"),
        ("gold", f"name of the field with the gold: a text, or a list of alternatives; default {defaults.gold}"),
        (
            "expected",
            "name of the field with the label (true, false, 1, 0, a verdict); default: expected, label or correct",
        ),
        ("kind", f"name of the field by which the tables are split; default {defaults.kind}"),
    ):
        check.add_argument(f"--{name}-field", default=asdict(defaults)[name], help=meaning)
    check.add_argument("--show", type=int, default=20, help="most disagreements to print; --json holds all of them")
    check.add_argument("--workers", type=int, default=1, help="number of scoring processes")
    check.add_argument("--deadline-seconds", type=float, default=5.0, help="time limit for one completion, in seconds")
    check.add_argument("--json", type=Path, help="write all counts and disagreements to this file")


def _check(options: argparse.Namespace) -> int:
    fields = Fields(options.completion_field, options.gold_field, options.expected_field, options.kind_field)
    rewards = task_reward(options.task) if options.task else [reward_spec(options.reward)]
    against = [reward_spec(options.against)] if options.against else []
    if options.workers < 1 or not 0 < options.deadline_seconds < float("inf") or options.show < 0:
        raise ValueError(
            f"--workers is {options.workers}, --deadline-seconds {options.deadline_seconds} and --show {options.show};"
            " give finite numbers, the first two above 0"
        )
    rows = read_rows(options.data, fields)
    begin = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("grading", total=len(rows) * (1 + len(against)))

        def graded_by(specs: list[RewardSpec]) -> list[Score]:
            return grade(
                rows,
                specs,
                num_workers=options.workers,
                deadline_seconds=options.deadline_seconds,
                progress=lambda done: progress.advance(task, done),
            )

        scores = graded_by(rewards)
        others = graded_by(against) if against else None
    found = report(rows, rewards, scores, others)
    if options.json:
        _write(options.json, {"data": str(options.data), "rewards": [asdict(spec) for spec in rewards]} | asdict(found))
    grader = options.task or rewards[0].name
    title = f"{options.data.name} by {grader}: {found.completions:,} completions in {time.perf_counter() - begin:.1f} s"
    _show(found, title, "the other grader" if options.against else "the labels", options.show)
    return 1 if found.disagreements else 0


def _write(path: Path, figures: dict[str, object]) -> None:
    try:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--json {path} cannot be written ({error.strerror})") from error


def _show(found: Report, title: str, against: str, num_shown: int) -> None:
    console = Console()
    console.print(escape(title))
    table = _table("", "verdict", "completions", "share")
    for verdict, count in found.verdicts.items():
        table.add_row(verdict, f"{count:,}", f"{count / found.completions:.1%}")
    console.print(table)
    console.print(f"mean reward {found.mean_reward:.4g}")
    if found.rules:
        table = _table("by rule", "rule", "correct", "other")
        for rule, counts in sorted(found.rules.items(), key=lambda item: -sum(item[1].values())):
            correct = counts.get(Verdict.CORRECT, 0)
            table.add_row(rule, f"{correct:,}", f"{sum(counts.values()) - correct:,}")
        console.print(table)
    if found.kinds:
        table = _table("by kind", "kind", "completions", "correct", "disagreements")
        for kind, counts in found.kinds.items():
            table.add_row(_printable(kind), *(f"{count:,}" for count in counts.values()))
        console.print(table)
    if found.compared:
        _show_disagreements(found, against, num_shown, console)


def _show_disagreements(found: Report, against: str, num_shown: int, console: Console) -> None:
    if found.disagreements:
        table = _table(
            "disagreements", "line", "verdict", "by " + against, "rule", "gold", "completion ends", left=True
        )
        for one in found.disagreements[:num_shown]:
            texts = (one.other, one.rule, one.gold[:60], one.completion[-80:])
            table.add_row(str(one.line), one.verdict, *(_printable(text) for text in texts))
        console.print(table)
    agreed = found.compared - len(found.disagreements)
    console.print(
        f"agreement with {against}: {agreed:,} of {found.compared:,} ({agreed / found.compared:.1%});"
        f" {found.false_positives:,} correct only here, {found.false_negatives:,} correct only there"
    )


def _printable(text: str) -> str:
    """`text` with rich's markup escaped and control characters as spaces: a completion cannot control the terminal."""
    return escape("".join(character if character.isprintable() else " " for character in text))


def _table(title: str, *columns: str, left: bool = False) -> Table:
    table = Table(title=escape(title))
    for index, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if left or not index else "right", overflow="fold")
    return table


if __name__ == "__main__":
    sys.exit(main())
