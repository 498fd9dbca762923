"""Measures accuracy and speed of graders of mathematical answers: ours beside those on PyPI.

Every grader gets the same items, from three sources:

- own solutions: every gold of the data sets in `--data` must equal the answer in its own solution;
- rewritings: a gold must equal generated rewritings of itself, and differ from changed ones;
- cases: the completions of `tests/verifier/mathematics/cases.jsonl`, which are labeled by hand.

Measured for every grader: agreement with the labels (%), false positives and negatives, answers per second of processor
time, latency (p50 and p99 in ms), and the numbers of hangs, exceptions and executed payloads. For ours also: whether
the same verdicts come in other threads, processes and orders, and the seconds of the scoring pool with hangs.

`--peers-python` names an interpreter with the other graders:

    pip install math-verify mathruler latex2sympy2_extended antlr4-python3-runtime==4.11.0 pylatexenc regex word2number
    pip install --no-deps evalscope==0.17.1 verl lm-eval
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The root of the project comes first, because this file has the name of a package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.parts.figures import command, machine, versions, wide_console, write
from benchmarks.parts.verifier.asking import DIED, HANG, NOT_ASKED, Item, Outcome, Unavailable, ask
from benchmarks.parts.verifier.data import distinct_golds, own_solutions, rewritten
from benchmarks.parts.verifier.graders import GRADERS, LABELS
from benchmarks.parts.verifier.report import plot, show
from benchmarks.parts.verifier.trust import executions, pool_with_hangs, same_verdicts
from buffer.machine import num_usable_cores

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT / "tests" / "verifier" / "mathematics" / "cases.jsonl"
MOST_REWRITINGS = 3
NUM_TIMED = 300
Parts = dict[str, list[Item]]


def labelled_cases(path: Path) -> list[Item]:
    """Reads the cases that are labeled by hand."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    golds = [row["gold"] if isinstance(row["gold"], list) else [row["gold"]] for row in rows]
    return [
        Item(row["kind"], row["completion"], gold, row["correct"], row.get("format", "any"))
        for row, gold in zip(rows, golds, strict=True)
    ]


def judged(items: Sequence[Item], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts the agreement with the labels. An answer without a verdict counts as wrong.

    `false_positive_share` is the share of the items labelled wrong, `false_negative_share` of those labelled correct.
    """
    asked = [pair for pair in zip(items, outcomes, strict=True) if pair[1].problem != NOT_ASKED]
    right = [item for item, outcome in asked if item.expected]
    wrong = [item for item, outcome in asked if not item.expected]
    false_positives = sum(outcome.correct is True for item, outcome in asked if not item.expected)
    false_negatives = sum(outcome.correct is not True for item, outcome in asked if item.expected)
    return {
        "items": len(asked),
        "agreement": 1 - (false_positives + false_negatives) / len(asked) if asked else None,
        "false_positives": false_positives,
        "false_positive_share": false_positives / len(wrong) if wrong else None,
        "false_negatives": false_negatives,
        "false_negative_share": false_negatives / len(right) if right else None,
    }


def by_kind(items: Sequence[Item], outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """The counts of `judged`, by kind of item."""
    places: dict[str, list[int]] = {}
    for at, item in enumerate(items):
        places.setdefault(item.kind, []).append(at)
    return {kind: judged([items[at] for at in its], [outcomes[at] for at in its]) for kind, its in places.items()}


def rate(outcomes: Sequence[Outcome]) -> float:
    """Answers per second of processor time; a hang counts with its deadline."""
    return len(outcomes) / max(sum(outcome.cpu_seconds for outcome in outcomes), 1e-9)


def measure(
    name: str, python: str, parts: Parts, repeats: int, deadline_seconds: float, progress: Progress
) -> dict[str, Any]:
    """Measures one grader: on all parts once, and `repeats` times on the first rewritings for its speed."""
    items = [item for part in parts.values() for item in part]
    timed = (parts["rewritings"] or items)[:NUM_TIMED]
    task = progress.add_task(LABELS[name], total=len(items) + repeats * len(timed))
    asked = ask(name, python, items, deadline_seconds, progress=lambda done: progress.update(task, completed=done))
    outcomes, results, at = asked.outcomes, {}, 0
    for part, its_items in parts.items():
        its_outcomes = outcomes[at : at + len(its_items)]
        results[part] = judged(its_items, its_outcomes) | {"kinds": by_kind(its_items, its_outcomes)}
        at += len(its_items)
        if part == "cases":
            # Some graders only read boxes, so these cases are also counted alone.
            boxed = [pair for pair in zip(its_items, its_outcomes, strict=True) if "\\boxed" in pair[0].completion]
            results["boxed_cases"] = judged([item for item, _ in boxed], [outcome for _, outcome in boxed])
    rates = []
    for turn in range(repeats):
        rates.append(rate(ask(name, python, timed, deadline_seconds).outcomes))
        progress.update(task, completed=len(items) + (turn + 1) * len(timed))
    latencies = sorted(outcome.seconds for outcome in outcomes if outcome.problem != NOT_ASKED)
    problems = [outcome.problem for outcome in outcomes]
    return {
        "release": asked.release,
        "parts": results,
        "answers_per_cpu_second": statistics.median(rates),
        "spread": [min(rates), max(rates)],
        "p50_ms": 1e3 * latencies[len(latencies) // 2],
        "p99_ms": 1e3 * latencies[len(latencies) * 99 // 100],
        "hangs": problems.count(HANG),
        "deaths": problems.count(DIED),
        "exceptions": sum(problem not in ("", HANG, DIED, NOT_ASKED) for problem in problems),
        "not_asked": problems.count(NOT_ASKED),
        "executions": executions(name, python, deadline_seconds),
    }


def parts_of(options: argparse.Namespace) -> Parts:
    """The items for every grader, by part. Without the data sets, own_solutions and rewritings are empty."""
    sets = own_solutions(options.data)
    rng = random.Random(0)
    own = [item for items in sets.values() for item in rng.sample(items, min(options.per_set, len(items)))]
    rewritings = rewritten(distinct_golds(sets)[: options.golds], MOST_REWRITINGS)
    return {"own_solutions": own, "rewritings": rewritings, "cases": labelled_cases(options.cases)}


def everything(data: Path, deadline_seconds: float, progress: Progress) -> dict[str, Any]:
    """Measures our grader on every row and every gold of the data sets."""
    sets = own_solutions(data)
    own, others = [item for items in sets.values() for item in items], rewritten(distinct_golds(sets), MOST_REWRITINGS)
    task = progress.add_task("Slipstream, all data", total=len(own) + len(others))
    asked = ask(
        name="ours",
        python=sys.executable,
        items=own + others,
        deadline_seconds=deadline_seconds,
        progress=lambda done: progress.update(task, completed=done),
    )
    progress.update(task, completed=len(own) + len(others))
    found = {"own_solutions": (own, asked.outcomes[: len(own)]), "rewritings": (others, asked.outcomes[len(own) :])}
    return {
        part: judged(items, outcomes) | {"kinds": by_kind(items, outcomes)} for part, (items, outcomes) in found.items()
    } | {"hangs": sum(outcome.problem == HANG for outcome in asked.outcomes)}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Measures all graders, and what only ours is measured on; returns the figures."""
    parts = parts_of(options)
    figures: dict[str, Any] = {
        "items": {part: len(items) for part, items in parts.items()},
        "graders": {},
        "skipped": {},
    }
    if not parts["own_solutions"]:
        figures["skipped"]["data"] = f"no data set in {options.data}: name their folder by --data"
    columns = (TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        for name in GRADERS if options.graders is None else ("ours", *options.graders):
            python = sys.executable if name == "ours" else options.peers_python
            try:
                figures["graders"][name] = measure(
                    name, python, parts, options.repeats, options.deadline_seconds, progress
                )
            except Unavailable as reason:
                figures["skipped"][name] = str(reason)
        if parts["own_solutions"] and not options.quick:
            figures["all_data"] = everything(options.data, options.deadline_seconds, progress)
        trusted = parts["cases"] + parts["rewritings"][: options.pool_answers]
        figures["same_verdict"] = {
            "items": len(trusted),
            "differing": same_verdicts(trusted, options.deadline_seconds, options.gmpy2),
        }
        answerable = [item for item in trusted if len(item.golds) == 1 and item.format == "any"]
        figures["pool"] = pool_with_hangs(
            answerable, options.pool_answers, options.workers, options.pool_deadline_seconds
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a plot of the agreement by kind here (.png or .svg)")
    parser.add_argument("--quick", action="store_true", help="few items, one repeat; about a minute")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument(
        "--cases",
        type=Path,
        default=CASES,
        help="labelled cases, in the form of tests/verifier/mathematics/cases.jsonl",
    )
    parser.add_argument("--peers-python", default=sys.executable, help="a Python with the other graders")
    parser.add_argument(
        "--graders",
        nargs="*",
        choices=[*list(GRADERS)[1:]],
        help="graders to compare with ours; default: all; without a name: none",
    )
    parser.add_argument("--gmpy2", type=Path, help="a folder made by pip install --target FOLDER gmpy2")
    parser.add_argument("--per-set", type=int, default=100, help="rows of each data set for every grader")
    parser.add_argument("--golds", type=int, default=300, help="golds whose rewritings every grader gets")
    parser.add_argument("--repeats", type=int, default=3, help="number of speed measurements of each grader")
    parser.add_argument(
        "--deadline-seconds", type=float, default=5.0, help="seconds for one answer, after which it counts as a hang"
    )
    parser.add_argument("--pool-answers", type=int, default=10_000, help="number of answers for the scoring pool")
    parser.add_argument(
        "--pool-deadline-seconds", type=float, default=0.5, help="deadline of the scoring pool, in seconds"
    )
    parser.add_argument(
        "--workers", type=int, default=num_usable_cores(), help="number of processes of the scoring pool"
    )
    options = parser.parse_args()
    if options.quick:
        options.per_set, options.golds, options.repeats = 10, min(options.golds, 60), 1
        options.pool_answers = min(options.pool_answers, 400)
    figures = compare(options) | {
        "command": command(),
        "machine": machine(),
        "versions": versions(("sympy", "mpmath", "latex2sympy2_extended")),
    }
    show(figures, wide_console())
    write(options.json, figures)
    if options.plot:
        plot(figures, options.plot)


if __name__ == "__main__":
    main()
