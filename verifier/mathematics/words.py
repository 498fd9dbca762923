r"""Compares answers that are words, or letters of a multiple choice.

Examples: `\text{Evelyn}`, `yes`, `(C)`, `C. 5`, `A, C and D`. Words are compared without case, punctuation, articles
and plural endings. A choice with a value equals its letter, and equals its value: `(C) 5` equals `C` and `5`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from verifier.mathematics.spelling import FUNCTIONS

Part = Callable[[str, str], bool]

_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_CHOICE = re.compile(r"(?:(?:option|choice|answer)\s+)?(?:\(\s*([A-Ja-j])\s*\)|([A-J]))[.:]?", re.IGNORECASE)
"""`(C)`, `C.`, `option C`"""
_CHOICE_WITH_VALUE = re.compile(r"(?:\(\s*([A-J])\s*\)|([A-J])\s*[).:])\s*(?!\w*\()(\S.*)", re.DOTALL)
"""`(C) 5`, `C. 5`; not a function value such as `(A) f(x)`."""
_FURTHER_CHOICE = re.compile(r"(?:^|[\s,;])(?:\(\s*[A-J]\s*\)|[A-J][).:])")
"""A second choice in the text: `(A) 3 (B) 4`."""
_LETTERS = re.compile(r"[A-H]{2,8}")
"""`ACD`"""
_LETTER_LIST = re.compile(r"\(?[A-H]\)?(?:\s*(?:,|;|and|\s)\s*\(?[A-H]\)?)+")
"""`A, C and D`"""
_WORD = re.compile(r"[a-zA-Z]{3}")
_MATHEMATICAL = re.compile(
    r"[\\^_=<>+/|{}\[\]]|\d\s*[-*]|\w\(|\b(?:" + "|".join(FUNCTIONS | {"sqrt", "cbrt", "pi"}) + r")\b"
)
_ROMAN = re.compile(r"[IVX]{2,}")
"""Roman numerals are compared as letters: `II` differs from `III`."""
_ARTICLES = frozenset(("the", "a", "an"))
_YES, _NO = frozenset(("yes", "true")), frozenset(("no", "false"))
_DOUBT = re.compile(r"\b(?:no|not|or|but|yes|true|false|maybe|however|could)\b|n't")
"""Words that take back a `yes` or `no` before them: `yes, but only if ...`."""
_SAME = {"dne": "does not exist", "limit does not exist": "does not exist", "none of these": "none of the above"}
"""Phrases with the same meaning."""


def same_words(prediction: str, gold: str, part: Part) -> bool | None:
    """Compares two choices, two truth values or two texts of words; None for other answers."""
    prediction, gold = _unwrap(prediction), _unwrap(gold)
    if not (gold[:1].isalpha() or gold[:1] == "(" or prediction[:1].isalpha() or prediction[:1] == "("):
        return None
    if (same := _same_choice(prediction, gold, part)) is not None:
        return same
    if _ROMAN.fullmatch(prediction) and _ROMAN.fullmatch(gold):
        return prediction == gold
    truth, other_truth = _truth(prediction), _truth(gold)
    if truth is not None or other_truth is not None:
        return truth == other_truth
    words = _is_words(gold), _is_words(prediction)
    if "," in prediction or "," in gold or not any(words):
        return None
    # Where only one side is words, the same letters decide nothing: `-abc` may be the negative of `abc`.
    return False if _canonical(prediction) != _canonical(gold) else all(words) or None


def _same_choice(prediction: str, gold: str, part: Part) -> bool | None:
    letters, other_letters = _letters(prediction), _letters(gold)
    if letters and other_letters:
        return letters == other_letters
    first, second = _choice(prediction), _choice(gold)
    if first and second:
        return first[0] == second[0] and (not first[1] or not second[1] or part(first[1], second[1]))
    if second and second[1] and not first:
        return part(prediction, second[1])
    if first and first[1] and not second:
        return part(first[1], gold) or None
    return None


def _choice(text: str) -> tuple[str, str] | None:
    """Returns (letter, value) of one choice; the value is empty for `(C)`. None for other texts."""
    if match := _CHOICE.fullmatch(text):
        # A lower-case letter without parentheses is a variable.
        return ((match[1] or match[2]).upper(), "") if match[1] or match[2].isupper() else None
    match = _CHOICE_WITH_VALUE.fullmatch(text)
    # `(A) 3 (B) 4` lists the choices and chooses none.
    if match and not _FURTHER_CHOICE.search(match[3]):
        return match[1] or match[2], match[3]
    return None


def _letters(text: str) -> frozenset[str]:
    """The letters of several choices such as `ACD` or `A, C and D`; empty for other texts."""
    is_joined = _LETTERS.fullmatch(text) and list(text) == sorted(set(text))
    if is_joined or _LETTER_LIST.fullmatch(text):
        return frozenset(re.findall(r"[A-H]", text))
    return frozenset()


def _truth(text: str) -> bool | None:
    first, _, rest = text.lower().partition(" ")
    word = first.rstrip(",.:;")
    if word not in _YES | _NO or _DOUBT.search(rest.replace("it is not", "") if word in _NO else rest):
        return None
    if rest and (first == word or len(rest) > 60 or _MATHEMATICAL.search(rest)):
        return None
    return word in _YES


def _unwrap(text: str) -> str:
    return _TEXT.sub(r"\1", text).strip().rstrip(".")


def _is_words(text: str) -> bool:
    """Whether the text is words: it has three letters in a row, nothing mathematical, and no digit in front.

    A digit in front makes it a value with a unit, as in `5 apples`.
    """
    is_framed = not text or text[0] in "-.(0123456789" or text[-1] in "!'"
    return bool(_WORD.search(text)) and not _MATHEMATICAL.search(text) and not is_framed


def _canonical(text: str) -> str:
    words = re.sub(r"[^\w ]", " ", text.lower()).split()
    words = [word for word in words if word not in _ARTICLES] or words
    text = _SAME.get(" ".join(words), " ".join(words))
    # The plural counts as the singular: `apples` equals `apple`.
    return re.sub(r"\b(\w{3,}[^s\W])s\b", r"\1", text)
