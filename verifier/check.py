"""Grades a file of completions and finds the disagreements: with the labels, or with a second grader.

`python -m verifier check` calls it. Scoring runs in the scoring pool, so a completion that hangs or crashes the grader
gets a verdict of its own and the others are graded all the same.
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
    """Names of the fields in a line of the file."""

    completion: str = "completion"
    gold: str = "gold"
    expected: str = ""
    """Field of the label; empty: the first of EXPECTED_FIELDS that a line has, if any."""
    kind: str = "kind"


@dataclass(frozen=True)
class Row:
    """One line of the file."""

    line: int
    """Number of the line, from 1."""
    completion: Completion
    expected: bool | None
    """The label: whether the completion is correct; None without a label."""
    kind: str
    """Kind of the completion, by which the tables group; empty when the line has none."""


@dataclass(frozen=True)
class Disagreement:
    """A completion whose verdict differs from the label, or from the other grader's verdict."""

    line: int
    kind: str
    verdict: str
    other: str
    """The label (`correct` or `not correct`), or the other grader's verdict."""
    rule: str
    gold: str
    completion: str
    """The last SHOWN_CHARACTERS characters of the completion."""


@dataclass
class Report:
    """The counts of a graded file."""

    completions: int = 0
    mean_reward: float = 0.0
    verdicts: dict[str, int] = field(default_factory=dict)
    """Number of completions by verdict."""
    rules: dict[str, dict[str, int]] = field(default_factory=dict)
    """Number of completions by the rule that decided them, then by verdict; empty for a grader without named rules."""
    kinds: dict[str, dict[str, int]] = field(default_factory=dict)
    """By kind: the numbers of `completions`, `correct` ones and `disagreements`; empty without kinds."""
    compared: int = 0
    """Number of completions with a label, or of all completions when there is a second grader."""
    false_positives: int = 0
    """Disagreements in which this grader says correct."""
    false_negatives: int = 0
    """Disagreements in which the label or the other grader says correct."""
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
    # Not resolved: other keys of the file refer to the rest of a run's configuration. A reward list has no references.
    rewards = OmegaConf.to_container(OmegaConf.load(path), resolve=False).get("reward")  # type: ignore[union-attr]
    if not rewards:
        raise ValueError(f"the task {task} lists no reward in {path.name}; name one by --reward")
    return [reward_spec(reward) for reward in rewards]


def reward_spec(reward: Any) -> RewardSpec:
    """Reads one reward: its name, a mapping with name, weight and options, or such a mapping as YAML text.

    Raises:
        ValueError: when `reward` is none of these.
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
    """Reads a file of JSON lines.

    Raises:
        ValueError: with one sentence, when the file cannot be read or a line lacks a field.
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
        line=number,
        completion=Completion(text, gold if isinstance(gold, str) else json.dumps(gold)),
        expected=_expected(record[label], f"{path}, line {number}: {label}") if label else None,
        kind=str(record.get(fields.kind, "")),
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
    """Scores the rows in groups of GROUP_SIZE; returns one score per row, in order.

    Args:
        rows: what to grade.
        rewards: the rewards, exactly one of them a grader.
        num_workers: number of scoring processes.
        deadline_seconds: time limit for one completion.
        progress: called after every group with its number of rows.

    Raises:
        ValueError: when the rewards are not valid.
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
    """Counts verdicts and collects the disagreements with `others`, a second grader's scores, or with the labels."""
    explain = build_scorer(rewards).grader.explain
    found = Report(completions=len(rows), mean_reward=sum(score.reward for score in scores) / len(rows))
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
    """Whether two verdicts differ. A label only says correct or not; two graders are compared verdict by verdict."""
    return verdict is Verdict.CORRECT if other == "not correct" else verdict.value != other


def _disagreement(row: Row, verdict: Verdict, other: str, rule: str) -> Disagreement:
    completion = row.completion
    return Disagreement(
        line=row.line,
        kind=row.kind,
        verdict=verdict.value,
        other=other,
        rule=rule,
        gold=completion.gold[:SHOWN_CHARACTERS],
        completion=completion.text[-SHOWN_CHARACTERS:],
    )
