r"""The registry of rewards, and the scorer that weighs and adds them.

A registered factory takes the options of its `RewardSpec` and returns a `Grader` or a plain reward function. A task
names exactly one grader. The score is the weighted sum over the rewards that did not abstain; the breakdown keeps every
part unweighted. A reward of one's own needs no registration: `module:factory` names it.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verifier import countdown, math_symbolic
from verifier.base import Completion, Grader, Reward, RewardFunction, RewardSpec, Score, Verdict
from verifier.extract import ANSWER_FORMATS, extract_answer, last_boxed, last_tagged
from verifier.math_answer import judge

RewardFactory = Callable[..., Reward]

_REGISTRY: dict[str, RewardFactory] = {}


def register(name: str) -> Callable[[RewardFactory], RewardFactory]:
    """Registers a factory of a reward under `name`.

    Raises:
        ValueError: when the name is taken or contains a colon.
    """

    def add(factory: RewardFactory) -> RewardFactory:
        if name in _REGISTRY or ":" in name:
            raise ValueError(f"the reward name {name!r} is taken or contains a colon; choose another")
        _REGISTRY[name] = factory
        return factory

    return add


def registered_names() -> list[str]:
    """The names a configuration may use, sorted."""
    return sorted(_REGISTRY)


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores completions by one task's rewards: `scorer(completion)`."""

    grader_name: str
    grader_weight: float
    grader: Grader
    functions: tuple[tuple[str, float, RewardFunction], ...]
    """(name, weight, function) of every reward but the grader."""

    def __call__(self, completion: Completion) -> Score:
        """The score; whatever a reward raises passes through."""
        verdict = self.grader.judge(completion)
        part = self.grader.rewards[verdict]
        reward, breakdown = self.grader_weight * part, {self.grader_name: part}
        for name, weight, function in self.functions:
            value = function(completion)
            if value is not None:
                breakdown[name] = value
                reward += weight * value
        if not math.isfinite(reward):
            raise ValueError(f"the rewards {breakdown} add up to {reward}, which is not a number to train on")
        truncated = completion.truncated and verdict is Verdict.NO_ANSWER
        return Score(reward, breakdown, Verdict.TRUNCATED if truncated else verdict)

    def unscored(self, verdict: Verdict, treated_as: Verdict) -> Score:
        """The score of a completion that could not be scored: the grader's reward for `treated_as`, under `verdict`."""
        part = self.grader.rewards[treated_as]
        return Score(self.grader_weight * part, {self.grader_name: part}, verdict)


def build_scorer(specs: Sequence[RewardSpec]) -> Scorer:
    """The scorer of a task.

    Raises:
        ValueError: for an unknown name, options its factory does not take, or not exactly one grader.
    """
    rewards = [(_unique_name(specs, index), spec.weight, _build(spec)) for index, spec in enumerate(specs)]
    graders = [(name, weight, reward) for name, weight, reward in rewards if isinstance(reward, Grader)]
    if len(graders) != 1:
        raise ValueError(
            f"verifier.rewards must name exactly one grader (a reward that decides the verdict), found {len(graders)}"
            f" in {[spec.name for spec in specs]}"
        )
    functions = tuple((name, weight, reward) for name, weight, reward in rewards if not isinstance(reward, Grader))
    return Scorer(*graders[0], functions)


def _unique_name(specs: Sequence[RewardSpec], index: int) -> str:
    name = specs[index].name
    repeats = sum(spec.name == name for spec in specs[:index])
    return f"{name}_{repeats + 1}" if repeats else name


def _build(spec: RewardSpec) -> Reward:
    factory = _find(spec.name)
    if not math.isfinite(spec.weight):
        raise ValueError(f"verifier.rewards: the weight of {spec.name} is {spec.weight}; give a finite number")
    try:
        return factory(**spec.options)
    except TypeError as error:
        raise ValueError(f"verifier.rewards: {spec.name} does not take the options {spec.options}: {error}") from error


def _find(name: str) -> RewardFactory:
    if name in _REGISTRY:
        return _REGISTRY[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f"verifier.rewards: unknown reward {name!r}; choose one of {', '.join(registered_names())},"
            " or module:factory"
        )
    try:
        factory: RewardFactory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"verifier.rewards: cannot import the reward {name!r}: {error}") from error
    return factory


def _table(correct: float, wrong: float, no_answer: float) -> Mapping[Verdict, float]:
    return {Verdict.CORRECT: correct, Verdict.WRONG: wrong, Verdict.NO_ANSWER: no_answer}


def _verdict(answer: str | None, is_right: Callable[[str], bool]) -> Verdict:
    if answer is None:
        return Verdict.NO_ANSWER
    return Verdict.CORRECT if is_right(answer) else Verdict.WRONG


@register("boxed_math")
def boxed_math(correct: float = 1.0, wrong: float = -0.5, no_answer: float = -1.0) -> Grader:
    """SimpleRL-Zero: the last box, by mathematical equivalence."""
    return Grader(
        lambda completion: judge(completion.text, completion.gold, format="boxed").verdict,
        _table(correct, wrong, no_answer),
        math_symbolic.prepare,
    )


@register("accuracy_math")
def accuracy_math(correct: float = 1.0, wrong: float = 0.0, no_answer: float = 0.0, format: Any = "any") -> Grader:
    """The last answer in `format` (any, boxed or tags), by mathematical equivalence."""
    if format not in ANSWER_FORMATS:
        raise ValueError(f"accuracy_math: format is {format!r}; choose one of {', '.join(ANSWER_FORMATS)}")
    return Grader(
        lambda completion: judge(completion.text, completion.gold, format=format).verdict,
        _table(correct, wrong, no_answer),
        math_symbolic.prepare,
    )


@register("boxed_exact")
def boxed_exact(correct: float = 1.0, wrong: float = -0.5, no_answer: float = -1.0) -> Grader:
    """The last box as the same whole number, or else the same text without spaces; cheap."""

    def grade(completion: Completion) -> Verdict:
        return _verdict(last_boxed(completion.text), lambda answer: _same_exactly(answer, completion.gold))

    return Grader(grade, _table(correct, wrong, no_answer))


@register("countdown")
def countdown_equation(correct: float = 1.0, wrong: float = 0.1, no_answer: float = 0.0) -> Grader:
    """TinyZero's countdown: an expression in <answer> with each number once, equal to the target."""

    def grade(completion: Completion) -> Verdict:
        answer = last_tagged(completion.text)
        if answer is None:
            return Verdict.NO_ANSWER
        numbers, target = _read_countdown(completion.gold)
        return _verdict(answer, lambda expression: countdown.check(expression, numbers, target))

    return Grader(grade, _table(correct, wrong, no_answer))


@register("multiply")
def multiply(correct: float = 1.0, wrong: float = 0.1, no_answer: float = 0.0) -> Grader:
    """TinyZero's multiplication: the gold's whole number in <answer>."""

    def grade(completion: Completion) -> Verdict:
        return _verdict(
            extract_answer(completion.text, format="tags"), lambda answer: _same_exactly(answer, completion.gold)
        )

    return Grader(grade, _table(correct, wrong, no_answer))


def _same_exactly(answer: str, gold: str) -> bool:
    first, second = (_as_integer(text) for text in (answer, gold))
    if first is not None and second is not None:
        return first == second
    return "".join(answer.split()) == "".join(gold.split())


def _as_integer(text: str) -> int | None:
    digits = text.strip().replace(",", "").removeprefix("+")
    is_short = digits.removeprefix("-").isdecimal() and digits.isascii() and len(digits) < 1000
    return int(digits) if is_short else None


def _read_countdown(gold: str) -> tuple[list[int], int]:
    try:
        problem = json.loads(gold)
        return [int(number) for number in problem["numbers"]], int(problem["target"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'countdown: the gold is {gold[:80]!r}; it must be a JSON object {{"numbers": [...], "target": n}}'
        ) from error
