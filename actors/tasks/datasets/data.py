r"""The task `data`: questions and answers from the named fields of a data set.

The gold is a text. A list of texts or numbers is a list of alternatives, any of which is correct. The gold is then a
JSON text such as `["1/2", "0.5"]`, or the alternative itself if there is only one. An object, or a list of anything
else, becomes JSON text unchanged, for a reward that reads JSON. Dollar signs around mathematics are removed from a
gold.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from actors.tasks.base import Drawn, Problem, TaskConfig
from actors.tasks.datasets.records import comparable, read_problems
from actors.tasks.datasets.sources import Row
from verifier.mathematics.extract import last_boxed

logger = logging.getLogger(__name__)

BOXED = "boxed"
"""Value of `answer_pattern` for the last \\boxed{}, because a regular expression cannot match nested braces."""
_DOLLAR = re.compile(r"(?<!\\)\$")
_NUMBER = re.compile(r"[0-9]+")
HIGHEST_LEVEL = 1_000_000


def problems(config: TaskConfig) -> tuple[list[Problem], list[Problem]]:
    """Read (training, held-out) problems, in the order of their sources.

    Raises:
        ValueError: the errors of `read_problems`; a missing field, an empty question, an answer without a match of
            `answer_pattern`, or an invalid pattern.
    """
    pattern = _compile(config.answer_pattern)
    if (config.min_level or config.max_level) and not config.level_field:
        raise ValueError(
            f"task.min_level={config.min_level} and task.max_level={config.max_level} need task.level_field, the field"
            " that holds a problem's level"
        )

    def read(row: Row) -> Drawn:
        question = _text(row.field(config.question_field, "task.question_field"), row.where, config.question_field)
        if not question:
            raise ValueError(f"{row.where}: field {config.question_field!r} is empty; a problem needs a question")
        return Drawn(comparable(question), question, _gold(config, pattern, row), _level(config, row))

    train, held_out = read_problems(config, read)
    without_level = sum(problem.level == 0 for problem in train) if config.level_field else 0
    if without_level == len(train):
        raise ValueError(
            f"no record of {config.data_path} holds a number in field {config.level_field!r}; set task.level_field"
        )
    if without_level:
        logger.warning("%s: %d records have no level, which counts as 0", config.data_path, without_level)
    return train, held_out


def _compile(pattern: str) -> re.Pattern[str] | None:
    if not pattern or pattern == BOXED:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"task.answer_pattern {pattern!r} is not a regular expression: {error}") from error
    if compiled.groups != 1:
        raise ValueError(
            f"task.answer_pattern {pattern!r} has {compiled.groups} groups; put one around the answer, or write {BOXED}"
        )
    return compiled


def _gold(config: TaskConfig, pattern: re.Pattern[str] | None, row: Row) -> str:
    value = row.field(config.answer_field, "task.answer_field")
    is_several = isinstance(value, list) and all(type(item) in (str, int, float) for item in value)
    if isinstance(value, dict | list) and not is_several:
        return json.dumps(value, ensure_ascii=False)
    golds = []
    for item in value if is_several else [value]:
        text = _text(item, row.where, config.answer_field)
        if config.answer_pattern == BOXED:
            text = last_boxed(text) or ""
        elif pattern and text:
            matches = pattern.findall(text)
            if not matches:
                raise ValueError(
                    f"{row.where}: field {config.answer_field!r} has no match of task.answer_pattern"
                    f" {config.answer_pattern!r}"
                )
            text = matches[-1].strip()
        golds.append(_without_dollars(text))
    different = [gold for gold in dict.fromkeys(golds) if gold]
    return json.dumps(different, ensure_ascii=False) if len(different) > 1 else "".join(different)


def _text(value: Any, where: str, field: str) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        # Some data sets write an integer answer as 27.0, but a model answers 27.
        value = int(value)
    if not isinstance(value, str | int | float):
        shown = json.dumps(value, default=str)[:60]
        raise ValueError(f"{where}: field {field!r} is {shown}; it must be text or a number")
    return str(value).strip()


def _without_dollars(text: str) -> str:
    """Return the text without dollar signs.

    An odd number of dollar signs stays: a sign without a partner means money.
    """
    return _DOLLAR.sub("", text).strip() if len(_DOLLAR.findall(text)) % 2 == 0 else text


def _level(config: TaskConfig, row: Row) -> int:
    """Return the first number in the level field. 0 if there is none, because evaluation sets often have no levels."""
    if not config.level_field:
        return 0
    try:
        value = row.field(config.level_field)
    except ValueError:
        return 0
    # Digits only: the hyphen in "level-3" is not a minus sign.
    found = _NUMBER.search(str(value))
    if found and (len(found[0]) > 18 or int(found[0]) > HIGHEST_LEVEL):
        raise ValueError(
            f"{row.where}: the number in field {config.level_field!r} is {found[0][:30]}, above the highest level"
            f" {HIGHEST_LEVEL}; set task.level_field to the field of the difficulty"
        )
    return int(found[0]) if found else 0
