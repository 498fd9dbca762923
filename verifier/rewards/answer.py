r"""The graders: rewards that judge the answer and decide the verdict. docs/rewards.md has a table of them.

Every grader takes the options `correct`, `wrong` and `no_answer`: the reward of each verdict before weighting.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from verifier.base import Completion, Grader, Verdict
from verifier.mathematics import symbolic
from verifier.mathematics.answer import judge
from verifier.mathematics.extract import ANSWER_FORMATS, AnswerFormat, extract_answer, last_boxed, last_tagged
from verifier.rewards import countdown, knights_knaves
from verifier.rewards.format import LOGIC_TAGS, has_tags_in_order
from verifier.rewards.registry import register

_INTEGER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)", re.ASCII)
_SPACES = (r"\,", r"\;", r"\:", r"\!", "~", "\\")
"""LaTeX's spaces. The last one is what `strip` leaves of a backslash with a space."""
MAX_EXACT = 1_000
"""Characters of an answer that may be a whole number."""


@register("accuracy")
def accuracy(
    correct: float = 1.0,
    wrong: float = 0.0,
    no_answer: float = 0.0,
    format: AnswerFormat = "any",
    after_thinking: bool = False,
    allow_truncated: bool = True,
) -> Grader:
    """Correct when the final answer is mathematically equal to the gold.

    Args:
        correct: reward of a correct answer.
        wrong: reward of a wrong answer.
        no_answer: reward without an answer.
        format: where the answer must stand: `boxed`, `tags` or `any`.
        after_thinking: an answer counts only in a completion with a closing </think>.
        allow_truncated: False: a completion that the length limit ended has no answer.
    """
    if format not in ANSWER_FORMATS:
        raise ValueError(f"format is {format!r}; choose one of {', '.join(ANSWER_FORMATS)}")

    def grade(completion: Completion) -> Verdict:
        if completion.truncated and not allow_truncated:
            return Verdict.NO_ANSWER
        if after_thinking and "</think>" not in completion.text:
            return Verdict.NO_ANSWER
        return judge(completion.text, completion.gold, format=format).verdict

    def explain(completion: Completion) -> str:
        return judge(completion.text, completion.gold, format=format).rule

    return Grader(grade, _values(correct, wrong, no_answer), symbolic.prepare, explain)


@register("boxed_format")
def boxed_format(correct: float = 1.0, wrong: float = -0.5, no_answer: float = -1.0) -> Grader:
    """`accuracy` with the answer in the last box, and a penalty for a wrong or a missing box."""
    return accuracy(correct, wrong, no_answer, format="boxed")


@register("boxed_exact")
def boxed_exact(correct: float = 1.0, wrong: float = -0.5, no_answer: float = -1.0) -> Grader:
    """Compares the last box with the gold as whole numbers, or else as texts without white space. It is fast."""

    def grade(completion: Completion) -> Verdict:
        return _verdict(last_boxed(completion.text), lambda answer: _same_exactly(answer, completion.gold))

    return Grader(grade, _values(correct, wrong, no_answer))


@register("countdown")
def countdown_expression(correct: float = 1.0, wrong: float = 0.1, no_answer: float = 0.0) -> Grader:
    """TinyZero: the expression in <answer> uses each given number exactly once and equals the target."""

    def grade(completion: Completion) -> Verdict:
        answer = last_tagged(completion.text)
        if answer is None:
            return Verdict.NO_ANSWER
        numbers, target = _read_countdown(completion.gold)
        return _verdict(answer, lambda expression: countdown.check(expression, numbers, target))

    return Grader(grade, _values(correct, wrong, no_answer))


@register("countdown_equation")
def countdown_equation(correct: float = 1.0, wrong: float = 0.0, no_answer: float = 0.0) -> Grader:
    """mini-deepseek-r1: `countdown` with a reward of 0 for a wrong answer."""
    return countdown_expression(correct, wrong, no_answer)


@register("multiply")
def multiply(correct: float = 1.0, wrong: float = 0.1, no_answer: float = 0.0) -> Grader:
    """TinyZero: <answer> holds the gold, compared as in `boxed_exact`."""

    def grade(completion: Completion) -> Verdict:
        answer = extract_answer(completion.text, format="tags")
        return _verdict(answer, lambda found: _same_exactly(found, completion.gold))

    return Grader(grade, _values(correct, wrong, no_answer))


@register("knights_knaves")
def knights_knaves_roles(
    correct: float = 2.0,
    wrong: float = -1.5,
    no_answer: float = -2.0,
    strict_tags: bool = True,
) -> Grader:
    """Logic-RL: <answer> says of every person exactly once whether they are a knight or a knave.

    Args:
        correct: reward when every person is named as in the gold.
        wrong: reward when at least one person is not.
        no_answer: reward when <answer> is missing, or cannot be read as one plain statement per person.
        strict_tags: an answer counts only in a completion that also passes `tag_format`.
    """

    def grade(completion: Completion) -> Verdict:
        text = completion.text
        if strict_tags and not has_tags_in_order(text, LOGIC_TAGS):
            return Verdict.NO_ANSWER
        gold = knights_knaves.read_gold(completion.gold)
        said = knights_knaves.parse_answer(last_tagged(text) or "", list(gold))
        if said is None:
            return Verdict.NO_ANSWER
        return Verdict.CORRECT if said == gold else Verdict.WRONG

    return Grader(grade, _values(correct, wrong, no_answer))


def _values(correct: float, wrong: float, no_answer: float) -> Mapping[Verdict, float]:
    return {Verdict.CORRECT: float(correct), Verdict.WRONG: float(wrong), Verdict.NO_ANSWER: float(no_answer)}


def _verdict(answer: str | None, is_right: Callable[[str], bool]) -> Verdict:
    if answer is None:
        return Verdict.NO_ANSWER
    return Verdict.CORRECT if is_right(answer) else Verdict.WRONG


def _same_exactly(answer: str, gold: str) -> bool:
    answer, gold = _trimmed(answer), _trimmed(gold)
    first, second = as_integer(answer), as_integer(gold)
    if first is not None and second is not None:
        return first == second
    return "".join(answer.split()) == "".join(gold.split())


def _trimmed(text: str) -> str:
    """Return `text` without spaces at its ends, also LaTeX's, and without a final period."""
    if len(text) > MAX_EXACT:
        return text
    return _without_spaces(_without_spaces(text).removesuffix("."))


def _without_spaces(text: str) -> str:
    before = ""
    while text != before:
        before, text = text, text.strip()
        for space in _SPACES:
            text = text.removeprefix(space).removesuffix(space)
    return text


def as_integer(text: str) -> int | None:
    """Return `text` as a whole number, such as `-1,234`.

    None unless it is ASCII digits with at most a sign, and commas only between groups of three digits. `4,2` is a list.
    """
    return int(text.replace(",", "")) if len(text) <= MAX_EXACT and _INTEGER.fullmatch(text) else None


def _read_countdown(gold: str) -> tuple[list[int], int]:
    try:
        problem = json.loads(gold)
        return [int(number) for number in problem["numbers"]], int(problem["target"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'countdown: the gold is {gold[:80]!r}; it must be a JSON object {{"numbers": [...], "target": n}}'
        ) from error
