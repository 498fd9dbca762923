"""Grades a file of completions and finds what is disagreed about: with labels, or between two graders.

For `python -m verifier check`. Scoring runs in the pool, so a completion that hangs or crashes its grader is one
verdict among the others.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from verifier.base import Completion, RewardSpec, Score, Verdict
from verifier.scoring.pool import ScoringPool
from verifier.scoring.scorer import build_scorer

TASKS = Path(__file__).resolve().parent.parent / "configs" / "task"
EXPECTED_FIELDS = ("expected", "label", "correct")
MEMORY_BYTES = 2 << 30
GROUP_SIZE = 64
SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Fields:
    """The names of a line's fields."""

    completion: str = "completion"
    gold: str = "gold"
    expected: str = ""
    """The label; empty: the first of EXPECTED_FIELDS that a line has, if any."""
    kind: str = "kind"


@dataclass(frozen=True)
class Row:
    """One line of the file."""

    line: int
    completion: Completion
    expected: bool | None
    """Whether it should be correct; None without a label."""
    kind: str


@dataclass(frozen=True)
class Disagreement:
    """A completion whose verdict is not the label's or the other grader's."""

    line: int
    kind: str
    verdict: str
    other: str
    """The label (`correct` or `not correct`), or the other grader's verdict."""
    rule: str
    gold: str
    completion: str
    """Its end."""


@dataclass
class Report:
    """What grading a file came to."""

    completions: int = 0
    mean_reward: float = 0.0
    verdicts: dict[str, int] = field(default_factory=dict)
    rules: dict[str, dict[str, int]] = field(default_factory=dict)
    """Verdicts by the rule that decided; empty for a grader that names none."""
    kinds: dict[str, dict[str, int]] = field(default_factory=dict)
    """Completions, `correct` and `disagreements` by kind; empty without kinds."""
    compared: int = 0
    """Completions with a label, or all where another grader was asked."""
    false_positives: int = 0
    """Correct here, not so by the label or the other grader."""
    false_negatives: int = 0
    disagreements: list[Disagreement] = field(default_factory=list)


def task_reward(task: str) -> list[RewardSpec]:
    """The reward list of `configs/task/TASK.yaml`.

    Raises:
        ValueError: when there is no such task or it lists no rewards.
    """
    path = TASKS / f"{task}.yaml"
    names = sorted(found.stem for found in TASKS.glob("*.yaml"))
    if task not in names:
        raise ValueError(f"unknown task {task!r}; choose one of {', '.join(names)}, or name a reward by --reward")
    # Interpolations refer to the rest of a run's configuration, which is not here; a reward list has none.
    rewards = OmegaConf.to_container(OmegaConf.load(path), resolve=False).get("reward")  # type: ignore[union-attr]
    if not rewards:
        raise ValueError(f"the task {task} lists no reward in {path.name}; name one by --reward")
    return [reward_spec(reward) for reward in rewards]


def reward_spec(reward: Any) -> RewardSpec:
    """A reward from its name, or from a mapping with name, weight and options.

    Raises:
        ValueError: when it is neither.
    """
    if isinstance(reward, str):
        try:
            reward = (
                OmegaConf.to_container(OmegaConf.create(reward))
                if reward.lstrip().startswith("{")
                else {"name": reward}
            )
        except (OmegaConfBaseException, YAMLError, ValueError) as error:
            raise ValueError(f"the reward {reward!r} is neither a name nor {{name: ..., options: ...}}") from error
    if (
        not isinstance(reward, dict)
        or not isinstance(reward.get("name"), str)
        or reward.keys() - {"name", "weight", "options"}
    ):
        raise ValueError(f"the reward {reward!r} is neither a name nor {{name: ..., weight: ..., options: ...}}")
    weight, options = reward.get("weight", 1.0), reward.get("options") or {}
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not isinstance(options, dict):
        raise ValueError(
            f"the reward {reward['name']} has weight {weight!r} and options {options!r}; give a number, and options"
            " as {NAME: VALUE}"
        )
    return RewardSpec(reward["name"], float(weight), options)


def read_rows(path: Path, fields: Fields) -> list[Row]:
    """The completions of a file of JSON lines.

    Raises:
        ValueError: in one sentence, for what is no such file or a line without the fields.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give a file of JSON lines") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason}); give a file of JSON lines") from error
    rows = [_row(path, number, line, fields) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{path} holds no completions; give a file with one JSON object a line")
    return rows


def _row(path: Path, number: int, line: str, fields: Fields) -> Row:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is not JSON ({error}); give one JSON object a line") from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{path}, line {number} is no JSON object; give one with {fields.completion} and {fields.gold}"
        )
    for name, option in ((fields.completion, "--completion-field"), (fields.gold, "--gold-field")):
        if name not in record:
            raise ValueError(
                f"{path}, line {number} has no field {name!r}, only {', '.join(record)}; name it by {option}"
            )
    text, gold = record[fields.completion], record[fields.gold]
    if not isinstance(text, str):
        raise ValueError(f"{path}, line {number}: {fields.completion} is {text!r:.80}; it must be a text")
    if gold is None or gold in ("", [], {}):
        raise ValueError(f"{path}, line {number}: {fields.gold} is {gold!r}; it must be an answer")
    if fields.expected and fields.expected not in record:
        raise ValueError(f"{path}, line {number} has no field {fields.expected!r}, named by --expected-field")
    label = fields.expected or next((name for name in EXPECTED_FIELDS if name in record), "")
    return Row(
        number,
        Completion(text, gold if isinstance(gold, str) else json.dumps(gold)),
        _expected(record[label], f"{path}, line {number}: {label}") if label else None,
        str(record.get(fields.kind, "")),
    )


def _expected(value: Any, where: str) -> bool:
    if isinstance(value, str) and value in set(Verdict):
        return value == Verdict.CORRECT
    if value in (0, 1):
        return bool(value)
    raise ValueError(f"{where} is {value!r}; it must be true, false, 1, 0 or a verdict ({', '.join(Verdict)})")


def grade(
    rows: Sequence[Row],
    rewards: Sequence[RewardSpec],
    *,
    num_workers: int,
    deadline_seconds: float,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Score]:
    """One score per row, in order; `progress` is called with the number of rows of every part that is done.

    Raises:
        ValueError: for rewards that make no scorer.
        RuntimeError: when no scoring process starts.
    """

    async def run() -> list[Score]:
        scores: list[Score] = []
        for at in range(0, len(rows), GROUP_SIZE):
            part = [row.completion for row in rows[at : at + GROUP_SIZE]]
            scores += await pool.score_group(part)
            progress(len(part))
        return scores

    pool = ScoringPool(rewards, num_workers=num_workers, deadline_seconds=deadline_seconds, memory_bytes=MEMORY_BYTES)
    try:
        return asyncio.run(run())
    finally:
        pool.close()


def report(
    rows: Sequence[Row], rewards: Sequence[RewardSpec], scores: Sequence[Score], others: Sequence[Score] | None = None
) -> Report:
    """Counts, and every disagreement with the other grader's scores, or with the labels where there are none."""
    explain = build_scorer(rewards).grader.explain
    found = Report(len(rows), sum(score.reward for score in scores) / len(rows))
    found.verdicts = dict(Counter(score.verdict.value for score in scores).most_common())
    for index, (row, score) in enumerate(zip(rows, scores, strict=True)):
        is_graded = score.verdict not in (Verdict.TIMEOUT, Verdict.CRASH, Verdict.ERROR)
        rule = explain(row.completion) if explain and is_graded else ""
        if rule:
            counts = found.rules.setdefault(rule, {})
            counts[score.verdict] = counts.get(score.verdict, 0) + 1
        other = others[index].verdict.value if others else _label(row)
        disagreed = bool(other) and _differs(score.verdict, other)
        found.compared += bool(other)
        if disagreed:
            is_positive = score.verdict is Verdict.CORRECT
            found.false_positives += is_positive
            found.false_negatives += other == Verdict.CORRECT
            found.disagreements.append(_disagreement(row, score.verdict, other, rule))
        if row.kind:
            kind = found.kinds.setdefault(row.kind, {"completions": 0, "correct": 0, "disagreements": 0})
            kind["completions"] += 1
            kind["correct"] += score.verdict is Verdict.CORRECT
            kind["disagreements"] += disagreed
    return found


def _label(row: Row) -> str:
    return {None: "", True: Verdict.CORRECT.value, False: "not correct"}[row.expected]


def _differs(verdict: Verdict, other: str) -> bool:
    """A label only says whether it is correct; of two graders every verdict counts."""
    return verdict is Verdict.CORRECT if other == "not correct" else verdict.value != other


def _disagreement(row: Row, verdict: Verdict, other: str, rule: str) -> Disagreement:
    completion = row.completion
    return Disagreement(
        *(row.line, row.kind, verdict.value, other, rule),
        *(completion.gold[:SHOWN_CHARACTERS], completion.text[-SHOWN_CHARACTERS:]),
    )
