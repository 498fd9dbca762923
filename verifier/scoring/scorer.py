"""The scorer of a task: computes the weighted sum of its rewards, and keeps the value of each.

The reward of a completion is the weighted sum over the rewards that did not abstain. The breakdown holds their values
before weighting. Exactly one reward is the grader and decides the verdict, also with a weight of 0.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

from verifier.base import Completion, Grader, Reward, RewardFunction, RewardSpec, Score, Verdict
from verifier.rewards import answer, length
from verifier.rewards import format as format_rewards
from verifier.rewards.registry import RewardFactory, find_factory

BUILT_IN = (answer, format_rewards, length)
"""The modules of the built-in rewards. Their import registers them."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores completions with the rewards of one task: `scorer(completion)`."""

    grader_name: str
    grader_weight: float
    grader: Grader
    functions: tuple[tuple[str, float, RewardFunction], ...]
    """(name, weight, function) of every reward but the grader."""

    def __call__(self, completion: Completion) -> Score:
        """Returns the score of a completion. Exceptions of the rewards pass through.

        Raises:
            ValueError: when a reward returns something that is not a finite number.
        """
        verdict = Verdict(self.grader.judge(completion))
        breakdown = {self.grader_name: _number(self.grader_name, self.grader.rewards[verdict])}
        reward = self.grader_weight * breakdown[self.grader_name]
        judged = replace(completion, verdict=verdict)
        for name, weight, function in self.functions:
            value = function(judged)
            if value is not None:
                breakdown[name] = _number(name, value)
                reward += weight * breakdown[name]
        truncated = completion.truncated and verdict is Verdict.NO_ANSWER
        return Score(_number("their sum", reward), breakdown, Verdict.TRUNCATED if truncated else verdict)

    def unscored(self, verdict: Verdict, treated_as: Verdict, *, skipped: bool = False) -> Score:
        """Returns the score of a completion that could not be scored.

        Args:
            verdict: timeout, crash or error.
            treated_as: the verdict whose reward the completion gets.
            skipped: whether the completion must not be trained on.
        """
        part = float(self.grader.rewards[treated_as])
        return Score(self.grader_weight * part, {self.grader_name: part}, verdict, skipped)


def build_scorer(specs: Sequence[RewardSpec]) -> Scorer:
    """Builds the scorer of a task from its reward list.

    Raises:
        ValueError: with one sentence, for an unknown name, options that the factory does not take, a weight that is not
            finite, or a number of graders other than one.
    """
    rewards = [(name, spec.weight, _build(spec)) for name, spec in zip(_part_names(specs), specs, strict=True)]
    graders = [(name, weight, reward) for name, weight, reward in rewards if isinstance(reward, Grader)]
    if not graders:
        raise ValueError(
            f"reward names no grader, which decides the verdict, in {[spec.name for spec in specs]}; add one, for"
            " example {name: accuracy}, with weight: 0.0 if it is not to count"
        )
    if len(graders) > 1:
        raise ValueError(
            f"reward names {len(graders)} graders, {' and '.join(name for name, _, _ in graders)}, but exactly one"
            " decides the verdict; leave the others out"
        )
    [(grader_name, grader_weight, grader)] = graders
    functions = tuple((name, weight, reward) for name, weight, reward in rewards if not isinstance(reward, Grader))
    return Scorer(grader_name=grader_name, grader_weight=grader_weight, grader=grader, functions=functions)


def _part_names(specs: Sequence[RewardSpec]) -> list[str]:
    """Names of the rewards in breakdowns and curves: without the path, and with a number after a repeated name."""
    short = [spec.name.rpartition(":")[2] for spec in specs]
    repeats = [short[: index + 1].count(name) for index, name in enumerate(short)]
    return [f"{name}_{number}" if number > 1 else name for name, number in zip(short, repeats, strict=True)]


def _build(spec: RewardSpec) -> Reward:
    factory = find_factory(spec.name)
    if not math.isfinite(spec.weight):
        raise ValueError(f"reward: the weight of {spec.name} is {spec.weight}; give a finite number")
    _check_options(spec, factory)
    try:
        reward = factory(**spec.options)
    except TypeError as error:
        raise ValueError(
            f"reward: {spec.name} does not take the options {spec.options}: {error}; a reward is a function of its"
            " options that returns a Grader or a function of one completion"
        ) from error
    except ValueError as error:
        raise ValueError(f"reward: {spec.name}: {error}") from error
    # A user's factory may raise any exception.
    except Exception as error:
        raise ValueError(
            f"reward: {spec.name} raised {type(error).__name__}: {error} for the options {spec.options}; correct it"
        ) from error
    if isinstance(reward, Grader):
        _check_values(spec.name, reward)
    elif not callable(reward):
        raise ValueError(
            f"reward: {spec.name} made {type(reward).__name__}, not a Grader or a function of a completion"
        )
    return reward


def _check_options(spec: RewardSpec, factory: RewardFactory) -> None:
    """Checks options against the factory's annotations: int and float need a number, bool needs true or false."""
    parameters = inspect.signature(factory).parameters
    for name, value in spec.options.items():
        annotation = parameters[name].annotation if name in parameters else ""
        wanted = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
        is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if wanted in ("int", "float") and not (is_number and (wanted == "float" or isinstance(value, int))):
            kind = "whole" if wanted == "int" else "finite"
            raise ValueError(f"reward: {spec.name}: {name} is {value!r}; give a {kind} number")
        if wanted == "bool" and not isinstance(value, bool):
            raise ValueError(f"reward: {spec.name}: {name} is {value!r}; give true or false")


def _check_values(name: str, grader: Grader) -> None:
    for verdict in (Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER):
        value = grader.rewards.get(verdict)
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"reward: {name} gives {value!r} for the verdict {verdict}; give a finite number")


def _number(name: str, value: object) -> float:
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    raise ValueError(f"the reward {name} answered {value!r:.80}, which is not a number to train on")
