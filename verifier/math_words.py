r"""Answers that are words or a letter of a multiple choice: `\text{Evelyn}`, `(C)`, `C. 5`, `east`."""

from __future__ import annotations

import re

_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_CHOICE = re.compile(r"\(?\s*([A-Z])\s*\)?")
_CHOICE_WITH_CONTENT = re.compile(r"(?:\(\s*([A-Z])\s*\)|([A-Z])\s*[).:])(?!\w*\()")
_WORD = re.compile(r"[a-zA-Z]{3}")
_MATHEMATICAL = re.compile(r"[\\^_=<>+/|{}\[\]]|\d\s*[-*]")


def same_words(prediction: str, gold: str) -> bool | None:
    """Compares words without case and punctuation, and choices by letter; None when the gold is neither."""
    prediction, gold = _unwrap(prediction), _unwrap(gold)
    if choice := _CHOICE.fullmatch(gold):
        predicted = _CHOICE.fullmatch(prediction) or _CHOICE_WITH_CONTENT.match(prediction)
        if predicted:
            return choice[1] in predicted.groups()
        return None
    if _is_words(gold):
        return _canonical(prediction) == _canonical(gold)
    return None


def _unwrap(text: str) -> str:
    return _TEXT.sub(r"\1", text).strip().rstrip(".")


def _is_words(text: str) -> bool:
    """Words only: a run of three letters, nothing mathematical, no leading digit (that is a value with a unit)."""
    return (
        bool(_WORD.search(text)) and not _MATHEMATICAL.search(text) and not text[0].isdigit() and text[0] not in "-.("
    )


def _canonical(text: str) -> str:
    words = re.sub(r"[^\w ]", " ", text.lower()).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("the", "a", "an") else words)
