r"""Judges a mathematical answer against the gold: a row of layers, the cheapest first, each decisive or silent.

A layer takes the two answers and returns True, False or None ("not my kind of answer"). Structure is taken apart first
(units, relations, sets, matrices, lists), so that the expression layers only see single expressions: exact rational
arithmetic, exponents of primes, then values at seeded random points, sympy last. Every layer is bounded; nothing of the
text is ever evaluated by Python, and no call raises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from verifier.base import Verdict
from verifier.mathematics.calendar import same_calendar
from verifier.mathematics.collections import same_collection
from verifier.mathematics.expression import same_expression
from verifier.mathematics.extract import AnswerFormat, extract_answer, last_boxed
from verifier.mathematics.matrices import same_matrix
from verifier.mathematics.normalize import join_thousands, normalize
from verifier.mathematics.precision import same_numeral, same_rounded
from verifier.mathematics.relations import same_relation
from verifier.mathematics.sets import same_real_set
from verifier.mathematics.symbolic import is_admitted, same_symbolic
from verifier.mathematics.units import is_bare, same_quantity, split_unit
from verifier.mathematics.words import same_words

MAX_ANSWER_CHARACTERS = 1500
MAX_DEPTH = 6
MAX_COMPARISONS = 2500
MAX_SYMBOLIC = 2

_REMOVABLE_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")

Layer = Callable[[str, str], bool | None]
Part = Callable[[str, str], bool]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What `judge` found."""

    verdict: Verdict
    """correct, wrong or no_answer."""
    answer: str | None
    """The extracted answer; None without one."""
    gold: str
    """The gold that the answer equals, or else the first."""
    normalized_answer: str | None
    normalized_gold: str
    """Both in the one spelling in which they are compared."""
    rule: str
    """The layer that decided; `extraction` without an answer."""


def judge(
    completion: str, gold: str | Sequence[str], *, golds: Sequence[str] = (), format: AnswerFormat = "any"
) -> Judgement:
    r"""The verdict on the final answer of `completion` in the asked format; callable from any thread or process.

    Args:
        completion: the text without its prompt.
        gold: the reference answer, plain or as `$...$`, `\boxed{...}` or `... #### 42`; several (also as a JSON list
            of strings): the answer need only equal one.
        golds: further golds.
        format: where the answer must stand, see `extract_answer`.
    """
    every = [clean_gold(each) for each in (*_listed(gold), *golds)] or [""]
    answer = extract_answer(completion, format=format)
    if answer is None and format == "any" and completion.strip() in every:
        answer = completion.strip() or None
    if answer is None:
        normalized_gold = normalize(every[0]) if len(every[0]) <= MAX_ANSWER_CHARACTERS else every[0]
        return Judgement(Verdict.NO_ANSWER, None, every[0], None, normalized_gold, "extraction")
    judgements = (_judge_answer(answer, each) for each in every)
    first = next(judgements)
    return first if first.verdict is Verdict.CORRECT else next((j for j in judgements if j.verdict == "correct"), first)


def is_correct(
    completion: str, gold: str | Sequence[str], *, golds: Sequence[str] = (), format: AnswerFormat = "any"
) -> bool:
    """Whether the final answer of `completion` in the asked format is the gold, or one of several."""
    return judge(completion, gold, golds=golds, format=format).verdict is Verdict.CORRECT


def equivalent(prediction: str, gold: str) -> bool:
    """Whether two extracted answers mean the same."""
    if prediction.strip() == gold.strip():
        return bool(gold.strip())
    return _judge_answer(prediction, clean_gold(gold)).verdict is Verdict.CORRECT


def clean_gold(gold: str) -> str:
    r"""A gold without what marks it: the last box, what follows `####`, or itself."""
    if "####" in gold:
        gold = gold.rpartition("####")[2]
    return last_boxed(gold) or gold.strip()


def _listed(gold: str | Sequence[str]) -> Sequence[str]:
    """Several golds from a sequence or a JSON list of strings; a list of numbers is one gold."""
    if not isinstance(gold, str):
        return gold
    if gold.startswith('["') and gold.endswith('"]'):
        try:
            listed = json.loads(gold)
        # Nested too deep for the parser is no list of strings either.
        except (ValueError, RecursionError):
            return [gold]
        if all(isinstance(each, str) for each in listed):
            return [str(each) for each in listed]
    return [gold]


def _judge_answer(answer: str, gold: str) -> Judgement:
    same, rule = bool(answer) and answer.split() == gold.split(), "same_text"
    if same or max(len(answer), len(gold)) > MAX_ANSWER_CHARACTERS:
        return Judgement(Verdict.CORRECT if same else Verdict.WRONG, answer, gold, answer, gold, rule)
    normalized, normalized_gold = normalize(last_boxed(answer) or answer), normalize(gold)
    same, rule = _Comparison().compare(normalized, normalized_gold, 0)
    return Judgement(Verdict.CORRECT if same else Verdict.WRONG, answer, gold, normalized, normalized_gold, rule)


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

        def part(first: str, second: str) -> bool:
            return self.compare(first, second, depth + 1)[0]

        if (same := same_calendar(prediction, gold)) is not None:
            return same, "same_calendar"
        if (same := same_words(prediction, gold, part)) is not None:
            return same, "same_words"
        if (same := same_numeral(prediction, gold)) is not None:
            return same, "same_numeral"
        prediction, gold = join_thousands(prediction), join_thousands(gold)
        if (same := same_rounded(prediction, gold)) is not None:
            return same, "same_rounded"
        return self._compare_quantities(prediction, gold, part)

    def _compare_quantities(self, prediction: str, gold: str, part: Part) -> tuple[bool, str]:
        first, second = split_unit(prediction), split_unit(gold)
        rule = "units"

        def same(value: str, other: str) -> bool:
            nonlocal rule
            agree, rule = self._compare_values(value, other, part)
            return agree

        if same_quantity(first, second, same):
            return True, rule
        if is_bare(prediction, first[1]) or is_bare(gold, second[1]):
            return self._compare_values(prediction, gold, part)
        return False, rule

    def _compare_values(self, prediction: str, gold: str, part: Part) -> tuple[bool, str]:
        if _compact(prediction) == _compact(gold):
            return True, "same_text"
        if same_rounded(prediction, gold):
            return True, "same_rounded"
        layers: tuple[tuple[str, Layer], ...] = (
            ("same_real_set", same_real_set),
            ("same_relation", lambda first, second: same_relation(first, second, part)),
            ("same_matrix", lambda first, second: same_matrix(first, second, part)),
            ("same_collection", lambda first, second: same_collection(first, second, part)),
            ("same_expression", same_expression),
            ("same_symbolic", self._same_symbolic),
        )
        for rule, layer in layers:
            if (same := layer(prediction, gold)) is not None:
                return same, rule
        return False, "same_text"

    def _same_symbolic(self, prediction: str, gold: str) -> bool | None:
        if not self.symbolic_left or not (is_admitted(prediction) and is_admitted(gold)):
            return None
        self.symbolic_left -= 1
        return same_symbolic(prediction, gold)


def _compact(text: str) -> str:
    """Without spaces, except between two digits."""
    return _REMOVABLE_SPACE.sub("", text)
