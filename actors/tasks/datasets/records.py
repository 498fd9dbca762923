"""Splits the rows of a data set into training and held-out problems that do not overlap.

The held-out problems come from `eval_path`, or are the last `num_held_out` records of `data_path`. A training record is
dropped if its question is held out too; letter case, spaces and dollar signs are ignored in this comparison. Training
records outside `min_level` to `max_level` are dropped. Records without an answer cannot be scored; they are skipped,
and the log gives their number.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from actors.tasks.base import Drawn, Problem, TaskConfig, number_problems
from actors.tasks.datasets.sources import Row, read_rows

logger = logging.getLogger(__name__)

Reader = Callable[[Row], Drawn]
"""Converts a row to a problem. An empty gold means that the row has no answer."""

_IGNORED = re.compile(r"[\s$]+")


def comparable(question: str) -> str:
    """Return a key that is equal for questions that differ only in letter case, spaces and dollar signs."""
    return _IGNORED.sub("", question).casefold()


def read_problems(config: TaskConfig, read: Reader) -> tuple[list[Problem], list[Problem]]:
    """Read (training, held-out) problems, in the order of their sources.

    Raises:
        ValueError: a source is missing, unreadable or empty, `read` refuses a row, or there are too few records.
    """
    if not config.data_path:
        raise ValueError("task.data_path is empty; give the training problems, data.path=FILE")
    records = _read(config, config.data_path, config.split, read)
    if config.eval_path:
        held_out = _read(config, config.eval_path, config.eval_split, read)[: config.num_held_out or None]
    else:
        _check_count("num_held_out", config.num_held_out, len(records) - 1, config.data_path)
        cut = len(records) - config.num_held_out
        records, held_out = records[:cut], records[cut:]
    unseen = {drawn.key for drawn in held_out}
    train = [drawn for drawn in records if drawn.key not in unseen]
    if not train:
        raise ValueError(f"{config.data_path} has no training problem that is not held out too; give other files")
    train = _of_level(config, train)
    _check_count("num_train", config.num_train, len(train), config.data_path)
    return number_problems(train[: config.num_train or None], held_out)


def _of_level(config: TaskConfig, train: list[Drawn]) -> list[Drawn]:
    kept = [drawn for drawn in train if config.trains_on(drawn.level)]
    if not kept:
        levels = sorted({drawn.level for drawn in train})
        raise ValueError(
            f"task.min_level={config.min_level} and task.max_level={config.max_level} leave none of the {len(train)}"
            f" training problems of {config.data_path}, whose levels go from {levels[0]} to {levels[-1]}; change them,"
            " or name the field of the level in task.level_field"
        )
    if len(kept) < len(train):
        logger.info(
            "%s: %d of %d training problems are of the levels asked for", config.data_path, len(kept), len(train)
        )
    return kept


def _check_count(name: str, wanted: int, found: int, source: str) -> None:
    if wanted > found:
        rest = ", or set it to 0 for all of them" if name == "num_train" else ", or give data.eval_path"
        raise ValueError(
            f"task.{name} is {wanted}, but {source} has only {found} problems for it; lower task.{name}{rest}"
        )


def _read(config: TaskConfig, source: str, split: str, read: Reader) -> list[Drawn]:
    records = [read(row) for row in read_rows(source, subset=config.subset, split=split)]
    if not records:
        raise ValueError(f"data file {source} is empty; it must hold one JSON object per line")
    scorable = [record for record in records if record.gold]
    if not scorable:
        raise ValueError(
            f"data file {source} has only empty answers in field {config.answer_field!r}; set task.answer_field"
        )
    if len(scorable) < len(records):
        logger.warning("%s: skipped %d records with an empty answer", source, len(records) - len(scorable))
    return scorable
