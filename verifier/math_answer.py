r"""Judges a mathematical answer against the gold: a row of layers, the cheapest first, each decisive or silent.

A layer takes the two answers and returns True, False or None ("not my kind of answer"). Structure is taken apart first
(lists, tuples, sets, intervals, matrices, relations), so that the expression layers only see single expressions:
exact rational arithmetic, then values at seeded random points, sympy last. Every layer is bounded; nothing of the
text is ever evaluated by Python, and no call raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from verifier.base import Verdict
from verifier.extract import AnswerFormat, extract_answer
from verifier.math_collections import same_collection, same_matrix
from verifier.math_expression import same_expression
from verifier.math_normalize import join_thousands, normalize
from verifier.math_relations import same_relation
from verifier.math_symbolic import is_admitted, same_symbolic
from verifier.math_units import split_unit, units_agree
from verifier.math_words import same_words

MAX_ANSWER_CHARACTERS = 1500
MAX_DEPTH = 6
MAX_COMPARISONS = 4000
MAX_SYMBOLIC = 8

_REMOVABLE_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")

Layer = Callable[[str, str], bool | None]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What `judge` found: the verdict, the extracted answer (None without one), and the layer that decided."""

    verdict: Verdict
    answer: str | None
    rule: str


def judge(completion: str, gold: str, *, format: AnswerFormat = "any") -> Judgement:
    """The verdict (correct, wrong or no_answer) on the last answer of `completion` in the asked format."""
    answer = extract_answer(completion, format=format)
    if answer is None:
        return Judgement(Verdict.NO_ANSWER, None, "extraction")
    same, rule = _decide(answer, gold)
    return Judgement(Verdict.CORRECT if same else Verdict.WRONG, answer, rule)


def is_correct(completion: str, gold: str, *, format: AnswerFormat = "any") -> bool:
    """Whether the last answer of `completion` in the asked format is the gold."""
    return judge(completion, gold, format=format).verdict is Verdict.CORRECT


def equivalent(prediction: str, gold: str) -> bool:
    """Whether two extracted answers mean the same."""
    return _decide(prediction, gold)[0]


def _decide(prediction: str, gold: str) -> tuple[bool, str]:
    if max(len(prediction), len(gold)) > MAX_ANSWER_CHARACTERS:
        return prediction.split() == gold.split(), "same_text"
    return _Comparison().compare(normalize(prediction), normalize(gold), 0)


class _Comparison:
    """One run of the layers; counts its work, so that long lists of hard items end soon too."""

    def __init__(self) -> None:
        self.comparisons_left = MAX_COMPARISONS
        self.symbolic_left = MAX_SYMBOLIC

    def compare(self, prediction: str, gold: str, depth: int) -> tuple[bool, str]:
        """Whether two normalized answers, or parts at `depth` levels of structure, agree, and by which layer."""
        self.comparisons_left -= 1
        if _compact(prediction) == _compact(gold):
            return bool(_compact(gold)), "same_text"
        if depth > MAX_DEPTH or self.comparisons_left < 0 or not prediction or not gold:
            return False, "same_text"
        if (same := same_words(prediction, gold)) is not None:
            return same, "same_words"
        prediction, unit = split_unit(join_thousands(prediction))
        gold, gold_unit = split_unit(join_thousands(gold))
        if not units_agree(unit, gold_unit):
            return False, "units"
        for rule, layer in self._layers(depth).items():
            if (same := layer(prediction, gold)) is not None:
                return same, rule
        return _compact(prediction) == _compact(gold), "same_text"

    def _layers(self, depth: int) -> dict[str, Layer]:
        def part(first: str, second: str) -> bool:
            return self.compare(first, second, depth + 1)[0]

        return {
            "same_relation": lambda first, second: same_relation(first, second, part),
            "same_matrix": lambda first, second: same_matrix(first, second, part),
            "same_collection": lambda first, second: same_collection(first, second, part),
            "same_expression": same_expression,
            "same_symbolic": self._same_symbolic,
        }

    def _same_symbolic(self, prediction: str, gold: str) -> bool | None:
        if not self.symbolic_left or not (is_admitted(prediction) and is_admitted(gold)):
            return None
        self.symbolic_left -= 1
        return same_symbolic(prediction, gold)


def _compact(text: str) -> str:
    """Without spaces, except between two digits."""
    return _REMOVABLE_SPACE.sub("", text)
