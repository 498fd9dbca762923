r"""Judges a mathematical answer against the gold.

The comparison is a list of layers, cheapest first. A layer takes the two answers and returns True (equal), False
(different) or None (undecided: the next layer decides). The first layers handle structure: units, sets, relations,
matrices, lists. They pass the parts on, so the last layers only see single expressions. Those are compared by exact
rational arithmetic, then by the exponents of their primes, then by their values at seeded random points, and by sympy
last.

The work of every layer is bounded. Python never evaluates any part of the text, and no function here raises.
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
    """The result of `judge`."""

    verdict: Verdict
    """correct, wrong or no_answer."""
    answer: str | None
    """The extracted answer; None when the completion has none."""
    gold: str
    """The gold that the answer equals, or else the first gold."""
    normalized_answer: str | None
    """`answer` after `normalize`, as it is compared."""
    normalized_gold: str
    """`gold` after `normalize`, as it is compared."""
    rule: str
    """Name of the layer that decided; `extraction` when the completion has no answer."""


def judge(
    completion: str, gold: str | Sequence[str], *, golds: Sequence[str] = (), format: AnswerFormat = "any"
) -> Judgement:
    r"""Extracts the final answer of a completion and compares it with the gold. Safe in any thread or process.

    Args:
        completion: the text without its prompt.
        gold: the reference answer, plain or as `$...$`, `\boxed{...}` or `... #### 42`. A sequence, or a JSON list of
            strings, holds alternatives: the answer needs to equal only one of them.
        golds: further alternatives.
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
    """Whether the final answer of `completion` equals the gold, or one of several; arguments as in `judge`."""
    return judge(completion, gold, golds=golds, format=format).verdict is Verdict.CORRECT


def equivalent(prediction: str, gold: str) -> bool:
    """Whether two extracted answers are equal."""
    if prediction.strip() == gold.strip():
        return bool(gold.strip())
    return _judge_answer(prediction, clean_gold(gold)).verdict is Verdict.CORRECT


def clean_gold(gold: str) -> str:
    r"""The answer in a gold: the text after the last `####`, and in it the content of the last box, if there is one."""
    if "####" in gold:
        gold = gold.rpartition("####")[2]
    return last_boxed(gold) or gold.strip()


def _listed(gold: str | Sequence[str]) -> Sequence[str]:
    """The alternatives of a gold: `["1", "2"]` are two, because the items are strings; `[1, 2]` is one gold, a list."""
    if not isinstance(gold, str):
        return gold
    if gold.startswith('["') and gold.endswith('"]'):
        try:
            listed = json.loads(gold)
        # RecursionError: text nested so deep is not a list of strings.
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
    """One run of the layers. The number of comparisons is bounded, so that long lists of hard items end soon too."""

    def __init__(self) -> None:
        self.comparisons_left = MAX_COMPARISONS
        self.symbolic_left = MAX_SYMBOLIC

    def compare(self, prediction: str, gold: str, depth: int) -> tuple[bool, str]:
        """Returns (whether two normalized answers are equal, the layer that decided).

        Args:
            prediction: the answer, or a part of it.
            gold: the gold, or a part of it.
            depth: levels of structure that the two are parts of; 0 for whole answers.
        """
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
    """`text` without white space, except between two digits: `1 2` is not `12`."""
    return _REMOVABLE_SPACE.sub("", text)
