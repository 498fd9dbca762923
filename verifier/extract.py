r"""Finds the final answer in a completion: the last balanced \boxed{} or the last <answer> element.

Linear in the length of the text, never raises. A box that is never closed is no answer. What stands inside <think>
counts only when nothing after it is an answer.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

AnswerFormat = Literal["any", "boxed", "tags"]
ANSWER_FORMATS: tuple[str, ...] = get_args(AnswerFormat)

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\boxed\s+([^\s{}$\\]+)")
_PHRASE = re.compile(r"(?:final\s+answer|answer)\s*(?:is|:)\s*:?\s*([^\n]{1,400})", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.。](?:\s|$)")
_OPEN_TAG, _CLOSE_TAG = "<answer>", "</answer>"


def extract_answer(text: str, *, format: AnswerFormat = "any") -> str | None:
    """The final answer of a completion, stripped, or None when there is none in the asked format.

    Args:
        text: the completion.
        format: `boxed` wants a box, `tags` an <answer> element; `any` takes, in this order, an element (its box, if it
            has one), a box, a line `#### answer`, or the words "the answer is".
    """
    after_thinking = text.rpartition("</think>")[2]
    answer = _extract(after_thinking, format)
    if answer is None and len(after_thinking) < len(text):
        answer = _extract(text, format)
    return answer


def last_boxed(text: str) -> str | None:
    r"""The content of the \boxed{} or \fbox{} that closes last, or of a bare `\boxed 5`; None when there is none."""
    openings: list[tuple[bool, int]] = []
    answer: str | None = None
    for match in _BRACES.finditer(text):
        token = match[0]
        if token.endswith("{") and token != "\\{":
            openings.append((len(token) > 1, match.end()))
        elif token == "}" and openings:
            is_box, start = openings.pop()
            if is_box:
                answer = text[start : match.start()]
    if answer is None and (bare := _BARE_BOX.findall(text)):
        answer = bare[-1].rstrip(".,;")
    return answer.strip() if answer and answer.strip() else None


def last_tagged(text: str) -> str | None:
    """The content of the last closed <answer> element; None when there is none or it is empty."""
    end = text.rfind(_CLOSE_TAG)
    start = text.rfind(_OPEN_TAG, 0, max(end, 0))
    if start < 0:
        return None
    return text[start + len(_OPEN_TAG) : end].strip() or None


def _extract(text: str, format: AnswerFormat) -> str | None:
    if format == "boxed":
        return last_boxed(text)
    tagged = last_tagged(text)
    if format == "tags":
        return tagged
    if tagged is not None:
        return last_boxed(tagged) or tagged
    return last_boxed(text) or _after_hashes(text) or _after_phrase(text)


def _after_hashes(text: str) -> str | None:
    _, marker, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip() or None if marker else None


def _after_phrase(text: str) -> str | None:
    phrases = _PHRASE.findall(text)
    if not phrases:
        return None
    return _SENTENCE_END.split(phrases[-1], maxsplit=1)[0].strip(" *") or None
