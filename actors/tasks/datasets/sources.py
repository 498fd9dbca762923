"""Reads the rows of a data set: JSON lines, a JSON list, parquet, a saved data set, or the Hugging Face hub.

Only a source that begins with `hf:` is downloaded, so a mistyped path never starts a download. The `datasets` library
and `pyarrow` are imported when they are needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUB = "hf:"


@dataclass(frozen=True, slots=True)
class Row:
    """One record."""

    where: str
    """How error messages name the record."""
    fields: dict[str, Any]

    def field(self, path: str, setting: str = "") -> Any:
        """Return the value of a field.

        The path of a nested field is names and list positions joined by dots, as in `answer.value`.

        Raises:
            ValueError: there is no such field; the message names `setting` as the way out.
        """
        if path in self.fields:
            return self.fields[path]
        value: Any = self.fields
        for part in path.split("."):
            if isinstance(value, dict) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                there = ", ".join(self.fields) or "none"
                way_out = f": set {setting} to one of them" if setting else ""
                raise ValueError(f"{self.where} has no field {path!r}; it has {there}{way_out}")
        return value


def read_rows(source: str, *, subset: str, split: str) -> list[Row]:
    """Read all rows, in their order.

    Args:
        source: `hf:OWNER/NAME`, a folder (one saved by `datasets`, or one of data files), or a file.
        subset: subset of a data set with several; empty: the only one.
        split: split of a data set with splits.

    Raises:
        ValueError: the source is missing, unreadable, or does not hold rows; the message names the source and the row.
    """
    path = Path(source).expanduser()
    if source.startswith(HUB) or path.is_dir():
        return _number(source, _load_data_set(source, path, subset, split))
    if not path.is_file():
        raise ValueError(
            f"data file {source} does not exist; check data.path and data.eval_path, and write {HUB}OWNER/NAME for a"
            " data set of the Hugging Face hub"
        )
    if subset:
        raise ValueError(f"task.subset is {subset}, but {source} is one file and has no subsets; leave it out")
    if path.suffix == ".parquet":
        return _number(source, _read_parquet(path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data file {source} cannot be read as UTF-8 text: {error}") from error
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return _number(source, _parse(text, source, "a .json file holds a list of objects or one object per line"))
    lines = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
    way_out = "each line must be one JSON object"
    return [
        _row(f"{source} line {number}", _parse(line, f"{source} line {number}", way_out), way_out)
        for number, line in lines
    ]


def _number(source: str, records: Iterable[Any]) -> list[Row]:
    return [
        _row(f"{source} record {number}", record, "each record must be an object with fields")
        for number, record in enumerate(records, start=1)
    ]


def _row(where: str, record: Any, way_out: str) -> Row:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a JSON {type(record).__name__}; {way_out}")
    return Row(where, record)


def _parse(text: str, where: str, way_out: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error.msg}); {way_out}") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply to be read; {way_out}") from error


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"data file {path} cannot be read as parquet: {_first_line(error)}") from error
    return rows


def _load_data_set(source: str, path: Path, subset: str, split: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    is_saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    try:
        if not is_saved:
            name = source.removeprefix(HUB) if source.startswith(HUB) else str(path)
            return datasets.load_dataset(name, subset or None, split=split)
        saved = datasets.load_from_disk(str(path))
    # The library raises many types of errors for an unknown name, subset or split, and for a network that is down.
    except Exception as error:
        raise ValueError(
            f"data set {source} (task.subset {subset or 'not set'}, split {split}) cannot be loaded:"
            f" {_first_line(error)}"
        ) from error
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise ValueError(
            f"data set {source} has no split {split!r}; it has {', '.join(map(str, saved))}: set task.split or"
            " task.eval_split"
        )
    return saved[split]


def _first_line(error: Exception) -> str:
    """Return the first line of the error's message, and in parentheses that of its cause, which often says more."""
    said = (str(error) or type(error).__name__).splitlines()[0]
    return f"{said} ({_first_line(error.__cause__)})" if isinstance(error.__cause__, Exception) else said
