"""Problems from the user's own files: one JSON object per line, with a question and an answer field.

Held-out problems come from `eval_path`, or are the last `num_held_out` records of `data_path`. A training record whose
question is also held out is left out of training, so the two never overlap. A record whose answer is empty cannot be
scored: it is passed over, and the log says how many were.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from actors.environments.base import Problem, TaskConfig, number_problems

logger = logging.getLogger(__name__)


def problems(config: TaskConfig) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) problems, in the order of their files.

    Raises:
        ValueError: a missing, unreadable or empty file, a line that is not a JSON object, a missing field, an answer
            without a match of `answer_pattern`, or fewer records than asked for.
    """
    if not config.data_path:
        raise ValueError("task.data_path is empty; give the path of a JSON-lines file with the training problems")
    records = read_records(config, config.data_path)
    if config.eval_path:
        held_out = read_records(config, config.eval_path)
        _check_count("num_held_out", config.num_held_out, len(held_out), config.eval_path)
        held_out = held_out[: config.num_held_out or None]
    else:
        _check_count("num_held_out", config.num_held_out, len(records) - 1, config.data_path)
        cut = len(records) - config.num_held_out
        records, held_out = records[:cut], records[cut:]
    unseen = {question for question, _ in held_out}
    train = [record for record in records if record[0] not in unseen]
    if not train:
        raise ValueError(f"{config.data_path} has no training problem that is not held out too; give other files")
    _check_count("num_train", config.num_train, len(train), config.data_path)
    return number_problems(train[: config.num_train or None], held_out)


def _check_count(name: str, wanted: int, found: int, path: str) -> None:
    if wanted > found:
        raise ValueError(f"task.{name} is {wanted}, but {path} has only {found} problems for it; lower task.{name}")


def read_records(config: TaskConfig, name: str) -> list[tuple[str, str]]:
    """All (question, gold) of one file; blank lines and records with an empty answer are passed over.

    Raises:
        ValueError: as in `problems`, naming the file and the line.
    """
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"data file {path} does not exist; check task.data_path and task.eval_path")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data file {path} cannot be read as UTF-8 text: {error}") from error
    try:
        pattern = re.compile(config.answer_pattern)
    except re.error as error:
        raise ValueError(
            f"task.answer_pattern {config.answer_pattern!r} is not a regular expression: {error}"
        ) from error
    if config.answer_pattern and pattern.groups != 1:
        raise ValueError(
            f"task.answer_pattern {config.answer_pattern!r} has {pattern.groups} groups; put one around the answer"
        )
    records = [
        _read_record(config, pattern, line, f"{path} line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not records:
        raise ValueError(f"data file {path} is empty; it must hold one JSON object per line")
    scorable = [record for record in records if record[1]]
    if not scorable:
        raise ValueError(
            f"data file {path} has only empty answers in field {config.answer_field!r}; set task.answer_field"
        )
    if len(scorable) < len(records):
        logger.warning("%s: passed over %d records with an empty answer", path, len(records) - len(scorable))
    return scorable


def _read_record(config: TaskConfig, pattern: re.Pattern[str], line: str, where: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error.msg}); each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a JSON {type(record).__name__}; each line must be one JSON object")
    question = _text(record, config.question_field, "task.question_field", where)
    gold = _text(record, config.answer_field, "task.answer_field", where)
    if not question:
        raise ValueError(f"{where}: field {config.question_field!r} is empty; a problem needs a question")
    if config.answer_pattern:
        matches = pattern.findall(gold)
        if not matches:
            raise ValueError(
                f"{where}: field {config.answer_field!r} has no match of task.answer_pattern {config.answer_pattern!r}"
            )
        gold = matches[-1].strip()
    return question, gold


def _text(record: dict[str, Any], field: str, setting: str, where: str) -> str:
    if field not in record:
        raise ValueError(
            f"{where} has no field {field!r}; it has {', '.join(record) or 'none'}: set {setting} to one of them"
        )
    value = record[field]
    if isinstance(value, float) and value.is_integer():
        # Some sets write whole answers as 27.0; a model answers 27.
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{where}: field {field!r} is {json.dumps(value)[:60]}; it must be text or a number")
    return str(value).strip()
