r"""Finds the final answer in a completion: boxes, <answer> elements, `####`, "the answer is".

The rules:

- A box or element that is never closed is not an answer.
- Text inside <think> counts only when there is no answer outside.
- The last answer counts: in `\boxed{3}. Wait, \boxed{4}` it is 4.
- Answers with only words such as "or", "and" or "maybe" between them are one list: `\boxed{3} or \boxed{4}` is `3, 4`.
  So a hedge is wrong against a single gold, and a gold that is a list may be boxed item by item.

Every function is linear in the length of the text and never raises.
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
"""A box's opening, an escaped character, or a brace."""
_BARE_BOX = re.compile(r"\\boxed\s+([^\s{}$\\]+)")
r"""`\boxed 5`"""
_TAGGED = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
# The number of white-space characters is bounded in every place, so that matching a megabyte of spaces stays linear.
_PHRASE = re.compile(
    r"(?:(?:(?:final|correct|right)\s{1,5}(?:answer|option|choice)|answer)(?:\s{1,5}to\s{1,5}(?:the|this)\s{1,5}\w{1,20})?"
    r"\*{0,4}\s{0,5}(?:(?:is|are|would\s{1,5}be|must\s{1,5}be)(?:\s{0,5}[:：])?|[:：=]|(?=\$|\\[(\[]))|答案(?:是|为|[:：]){1,3})"
    r"[\s*]{0,20}(?:\\\[|\$\$)?\s{0,5}(?=([^\n]{1,400}))",
    re.IGNORECASE,
)
"""`The final answer is: 5`, `Answer: 5`, `答案是 5`; group 1 is the rest of the line."""
_HEADING = re.compile(
    r"^[^\w\n]{0,20}(?:final )?answer[^\w\n]{0,20}\n[\s*]{0,20}([^\n]{1,400})", re.IGNORECASE | re.MULTILINE
)
"""A line `**Final Answer**` with the answer on the next line."""
_CONCLUSION = re.compile(
    r"^\W*(?:(?:therefore|thus|hence|so|in\s+conclusion|∴)\b|we\s+(?:find|get|obtain|conclude|have)\b)[\s,:]*(?:that\s+)?(.+)$",
    re.IGNORECASE,
)
"""`Therefore, x = 5`, `We get 5`"""
_STATEMENT = re.compile(r"^.*\b(?:is|are|equals|be)\b(?!\s+not\b)\s*")
"""`The area is ` in front of a value."""
_SENTENCE = re.compile(r"(?:the|there|so|thus|we|it|this|that)\s", re.IGNORECASE)
"""A word that begins a sentence, so that the text is not a bare value."""
_INVERTED = re.compile(r"(.+?)\s+is\s+(?:the|our|my)\s+(?:\w+\s+)?(?:answer|solution|result)s?", re.IGNORECASE)
"""`12 is the answer`"""
_MATHEMATICAL = re.compile(r"[-+]?[\d$\\(\[{.]")
"""The beginning of a number or formula."""
_RESTATED = re.compile(r"(?:(?:the\s+)?(?:final\s+|correct\s+)?answer\s+is)\s*:?\s*", re.IGNORECASE)
"""`The answer is` once more inside an answer."""
_SENTENCE_END = re.compile(
    r"[.。!](?:\**)(?:\s|$)|\s(?:because|since|which\s+is|as\s+(?:required|desired))\b|,\s+not\b"
)
"""A full stop, or words that begin an explanation: `5 because ...`, `5, not 6`."""
_ABBREVIATION = re.compile(r"\b(?:[ap]\.m|No|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|sq|cu|Dr|Mr|Mrs|St)$")
"""An abbreviation in front of a full stop that ends no sentence: `3 p.m.`"""
_JOINT = re.compile(
    r"(?:[\s$.,;:&]|\\(?:quad|qquad|text|mathrm|textbf|,|;|!|\]|\[|\(|\))|[{}]|\b[a-zA-Z](?:_\{?\w\}?)?\s*=|"
    r"\b(?:and|or|but|either|also|alternatively|maybe|perhaps|possibly|possible|could|might|can|it|be|another|is|the|are|"
    r"answers?|both|else|though|although)\b)*",
    re.IGNORECASE,
)
r"""Words and signs between two answers that belong together: `\boxed{3} or \boxed{4}`."""
_ALTERNATIVE = re.compile(
    r"[\s$,(]{0,5}\bor\s(?:maybe |possibly |perhaps )?\$?(-?\\?[\d(][^\s$;]{0,40}?)\$?(?=[\s.,;)]|$)"
)
r"""A further value behind a box: `\boxed{3} or 4`."""
_HEDGE_JOINT = re.compile(r"[\s.,;(]*\b(?:or|alternatively|maybe|perhaps|possibly)\b[\s\w,'$]{0,40}", re.IGNORECASE)
"""`. Or maybe ` between two phrases "the answer is"."""


class Answer(NamedTuple):
    r"""An answer, and the start and end of the text that marks it, such as `\boxed{...}`."""

    text: str
    start: int
    end: int


def extract_answer(text: str, *, format: AnswerFormat = "any") -> str | None:
    """Returns the final answer of a completion, stripped; None when there is none in this format.

    Args:
        text: the completion.
        format: `boxed` takes only a box, `tags` only an <answer> element or the box in it. `any` takes the first of
            these that exists: an element, a box, a line `#### answer`, the words "the answer is", a last line that
            begins with "therefore" or the like, or a short text that is an answer and nothing else.
    """
    outside = without_thinking(text)
    answer = _extract(outside, format)
    if answer is None and len(outside) < len(text):
        answer = _extract(text, format)
    return answer


def without_thinking(text: str) -> str:
    """The text outside <think>...</think>.

    Text before a lone `</think>` is dropped, because the opening tag may be in the prompt. Text after a lone `<think>`
    is dropped too.
    """
    if "think>" not in text:
        return text
    outside = _THINKING.sub(" ", text) if text.count("<think>") <= 100 else text.rpartition("</think>")[2]
    return outside.rpartition("</think>")[2].partition("<think>")[0]


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{}` or `\fbox{}`, or of a `\boxed 5` without braces; None without a box.

    Boxes before it with only a joint such as "or" between them belong to the answer; so does an alternative after it,
    as in `\boxed{3} or 4`.
    """
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
    """The content of the last closed <answer> element, with joined elements before it; None when missing or empty."""
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
    """Yields every closed box in the order of the closing braces, so an inner box comes before its outer box."""
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
    """The last answer as text, after the answers that only a joint separates from it; None when the last is empty.

    Answers are joined by commas and equal ones are listed once. An outer box replaces the boxes inside it.
    """
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
    """`text` up to the end of its first sentence, or up to words that begin an explanation ("because", "since", ...).

    The full stop of an abbreviation such as "p.m." or "No." does not end a sentence.
    """
    start = 0
    while match := _SENTENCE_END.search(text, start):
        if match[0][0] != "." or not _ABBREVIATION.search(text[: match.start()]) or not text[match.end() :].strip():
            text = text[: match.start()]
            break
        start = match.end()
    return text.strip(" *")


def _bare(text: str) -> str | None:
    """`text` when it is an answer and nothing else: one short line with at most `MAX_BARE_WORDS` words; or None."""
    text = text.strip()
    if not text or len(text) > MAX_BARE_CHARACTERS or "\n" in text or "<answer" in text or "\\boxed" in text:
        return None
    words = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", re.sub(r"\\(?:text|math|operator)\w+|\\text", " ", text))
    return text if len(words) <= MAX_BARE_WORDS else None


def _concluded(text: str) -> str | None:
    """The answer in a last line such as `Therefore, x = 5.`, or in a completion of only one sentence; or None."""
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
    """The value that a sentence states: `12` for "the area is 12", or for "12 is the answer"; other text unchanged."""
    if inverted := _INVERTED.fullmatch(text):
        return inverted[1]
    return _STATEMENT.sub("", text) if is_sentence or _SENTENCE.match(text) else text
