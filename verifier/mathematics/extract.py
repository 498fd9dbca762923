r"""Finds the final answer in a completion: boxes, <answer> elements, `####`, "the answer is".

Linear in the length of the text, never raises. A box or element that is never closed is no answer. What stands inside
<think> counts only when nothing outside is an answer. Answers joined by nothing but "or", "and", "maybe" and the like
(`\boxed{3} or \boxed{4}`) are one answer, the list `3, 4`: a hedge fails against a single gold, and the parts of a
listed gold may be boxed one by one. Any other earlier answer counts as corrected by the last one.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

AnswerFormat = Literal["any", "boxed", "tags"]
ANSWER_FORMATS: tuple[str, ...] = get_args(AnswerFormat)

MAX_BARE_CHARACTERS = 200
MAX_BARE_WORDS = 4
MAX_PHRASES = 16

_BRACES = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\boxed\s+([^\s{}$\\]+)")
_TAGGED = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
# Every run of white space is bounded, so that a megabyte of it costs no more than a megabyte of anything else.
_PHRASE = re.compile(
    r"(?:(?:(?:final|correct|right)\s{1,5}(?:answer|option|choice)|answer)(?:\s{1,5}to\s{1,5}(?:the|this)\s{1,5}\w{1,20})?"
    r"\*{0,4}\s{0,5}(?:(?:is|are|would\s{1,5}be|must\s{1,5}be)(?:\s{0,5}[:：])?|[:：=]|(?=\$|\\[(\[]))|答案(?:是|为|[:：]){1,3})"
    r"[\s*]{0,20}(?:\\\[|\$\$)?\s{0,5}(?=([^\n]{1,400}))",
    re.IGNORECASE,
)
_HEADING = re.compile(
    r"^[^\w\n]{0,20}(?:final )?answer[^\w\n]{0,20}\n[\s*]{0,20}([^\n]{1,400})", re.IGNORECASE | re.MULTILINE
)
_CONCLUSION = re.compile(
    r"^\W*(?:(?:therefore|thus|hence|so|in\s+conclusion|∴)\b|we\s+(?:find|get|obtain|conclude|have)\b)[\s,:]*(?:that\s+)?(.+)$",
    re.IGNORECASE,
)
_STATEMENT = re.compile(r"^.*\b(?:is|are|equals|be)\b(?!\s+not\b)\s*")
_SENTENCE = re.compile(r"(?:the|there|so|thus|we|it|this|that)\s", re.IGNORECASE)
_INVERTED = re.compile(r"(.+?)\s+is\s+(?:the|our|my)\s+(?:\w+\s+)?(?:answer|solution|result)s?", re.IGNORECASE)
_MATHEMATICAL = re.compile(r"[-+]?[\d$\\(\[{.]")
_RESTATED = re.compile(r"(?:(?:the\s+)?(?:final\s+|correct\s+)?answer\s+is)\s*:?\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(
    r"[.。!](?:\**)(?:\s|$)|\s(?:because|since|which\s+is|as\s+(?:required|desired))\b|,\s+not\b"
)
_ABBREVIATION = re.compile(r"\b(?:[ap]\.m|No|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|sq|cu|Dr|Mr|Mrs|St)$")
_JOINT = re.compile(
    r"(?:[\s$.,;:&]|\\(?:quad|qquad|text|mathrm|textbf|,|;|!|\]|\[|\(|\))|[{}]|\b[a-zA-Z](?:_\{?\w\}?)?\s*=|"
    r"\b(?:and|or|but|either|also|alternatively|maybe|perhaps|possibly|possible|could|might|can|it|be|another|is|the|are|"
    r"answers?|both|else|though|although)\b)*",
    re.IGNORECASE,
)
_ALTERNATIVE = re.compile(
    r"[\s$,(]{0,5}\bor\s(?:maybe |possibly |perhaps )?\$?(-?\\?[\d(][^\s$;]{0,40}?)\$?(?=[\s.,;)]|$)"
)
_HEDGE_JOINT = re.compile(r"[\s.,;(]*\b(?:or|alternatively|maybe|perhaps|possibly)\b[\s\w,'$]{0,40}", re.IGNORECASE)


class Answer(NamedTuple):
    """An answer and where it stands: its own start and end with whatever marks it."""

    text: str
    start: int
    end: int


def extract_answer(text: str, *, format: AnswerFormat = "any") -> str | None:
    """The final answer of a completion, stripped, or None when there is none in the asked format.

    Args:
        text: the completion.
        format: `boxed` wants a box, `tags` an <answer> element; `any` takes, in this order, an element (its box, if it
            has one), a box, a line `#### answer`, the words "the answer is", what a last line concludes with
            "therefore", or a short text that is nothing but an answer.
    """
    outside = without_thinking(text)
    answer = _extract(outside, format)
    if answer is None and len(outside) < len(text):
        answer = _extract(text, format)
    return answer


def without_thinking(text: str) -> str:
    """The text outside <think>; an opening tag that the prompt already holds may be missing, a closing tag too."""
    if "think>" not in text:
        return text
    outside = _THINKING.sub(" ", text) if text.count("<think>") <= 100 else text.rpartition("</think>")[2]
    return outside.rpartition("</think>")[2].partition("<think>")[0]


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{} or \fbox{} with those joined to it, or of a bare `\boxed 5`; or None."""
    if not any(mark in text for mark in ("\\boxed", "\\fbox", "\\framebox")):
        return None
    boxes = list(_boxes(text))
    if boxes and (alternative := _ALTERNATIVE.match(text, boxes[-1].end)):
        boxes.append(Answer(alternative[1], boxes[-1].end, alternative.end()))
    answer = _join(text, boxes)
    if answer is None and (bare := _BARE_BOX.findall(text)):
        answer = bare[-1].rstrip(".,;").strip() or None
    return answer


def last_tagged(text: str) -> str | None:
    """The content of the last closed <answer> element with those joined to it; None without one or when it is empty."""
    if "</answer>" not in text:
        return None
    return _join(text, (Answer(match[1].strip(), *match.span()) for match in _TAGGED.finditer(text)))


def _extract(text: str, format: AnswerFormat) -> str | None:
    if format == "boxed":
        return last_boxed(text)
    tagged = last_tagged(text)
    if tagged is not None:
        tagged = last_boxed(tagged) or tagged
    if format == "tags" or tagged is not None:
        return tagged
    boxed = last_boxed(text)
    if boxed is not None:
        later = _after_phrase(text[text.rfind("\\boxed") :]) or ""
        return later if _MATHEMATICAL.match(later) and "\\boxed" not in later else boxed
    return _after_hashes(text) or _after_phrase(text) or _concluded(text) or _bare(text)


def _boxes(text: str) -> Iterable[Answer]:
    """Every closed box outside other boxes, in the order in which they close."""
    openings: list[tuple[bool, int, int]] = []
    for match in _BRACES.finditer(text):
        token = match[0]
        if token.endswith("{") and token != "\\{":
            openings.append((len(token) > 1, match.start(), match.end()))
        elif token == "}" and openings:
            is_box, start, inside = openings.pop()
            if is_box:
                yield Answer(text[inside : match.start()].strip(), start, match.end())


def _join(text: str, answers: Iterable[Answer]) -> str | None:
    """The last answer, with different ones before it that only a joint separates; None when the last is empty."""
    joined: list[Answer] = []
    for answer in answers:
        if joined and answer.start < joined[-1].start:
            joined.pop()
        gap = text[joined[-1].end : answer.start] if joined else ""
        if len(gap) > 60 or not _JOINT.fullmatch(gap):
            joined = []
        joined.append(answer)
    if not joined or not joined[-1].text:
        return None
    return ", ".join(dict.fromkeys(answer.text for answer in joined if answer.text))


def _after_hashes(text: str) -> str | None:
    _, marker, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip() or None if marker else None


def _after_phrase(text: str) -> str | None:
    answers: list[str] = []
    end = 0
    for match in deque(_PHRASE.finditer(text), maxlen=MAX_PHRASES):
        answer = _first_sentence(match[1])
        gap = text[end : match.start()]
        if not (answers and len(gap) < 60 and _HEDGE_JOINT.fullmatch(gap)):
            answers = []
        answers.append(_stated(_RESTATED.sub("", answer)))
        end = match.start(1) + len(answer)
    if not answers and (heading := _HEADING.findall(text)):
        answers = [_first_sentence(heading[-1])]
    return ", ".join(dict.fromkeys(answers)).strip() or None


def _first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence; no further than the words that begin an explanation."""
    start = 0
    while match := _SENTENCE_END.search(text, start):
        if match[0][0] != "." or not _ABBREVIATION.search(text[: match.start()]) or not text[match.end() :].strip():
            text = text[: match.start()]
            break
        start = match.end()
    return text.strip(" *")


def _bare(text: str) -> str | None:
    """A whole completion that is nothing but an answer: one short line without a sentence in it."""
    text = text.strip()
    if not text or len(text) > MAX_BARE_CHARACTERS or "\n" in text or "<answer" in text or "\\boxed" in text:
        return None
    words = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", re.sub(r"\\(?:text|math|operator)\w+|\\text", " ", text))
    return text if len(words) <= MAX_BARE_WORDS else None


def _concluded(text: str) -> str | None:
    """What the last line concludes: `Therefore, x = 5.`; a completion of one sentence concludes, too."""
    line = text.strip()[-MAX_BARE_CHARACTERS * 2 :].rpartition("\n")[2]
    match = _CONCLUSION.match(line)
    if (
        "\\boxed" in line
        or "<answer" in line
        or (match is None and not (line == text.strip() and _SENTENCE.match(line)))
    ):
        return None
    return _bare(_stated(_first_sentence(match[1] if match else line), is_sentence=True))


def _stated(text: str, *, is_sentence: bool = False) -> str:
    """The value that a sentence states: `12` of "the area is 12"; other text as it is."""
    if inverted := _INVERTED.fullmatch(text):
        return inverted[1]
    return _STATEMENT.sub("", text) if is_sentence or _SENTENCE.match(text) else text
