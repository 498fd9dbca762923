r"""Turns the data sets of `--data` into items: every gold with the answer in its own solution, and with rewritings.

Only data sets with mathematical golds are used. Where a data set has no solutions, the completion is the gold in a box,
as a model would write it.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.parts.verifier.asking import Item
from benchmarks.parts.verifier.rewritings import CHANGES, REWRITINGS

Row = dict[str, Any]

_BOX = re.compile(r"\\(?:boxed|fbox)\b")
_DOLLAR = re.compile(r"(?<!\\)\$")


def boxed(answer: object) -> str:
    return f"So the answer is $\\boxed{{{answer}}}$."


def _last_box(text: str) -> str:
    """The content of the last box, by code that shares nothing with the verifier."""
    at = [match.end() for match in _BOX.finditer(text)][-1] + 1
    end, depth = at, 1
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return text[at : end - 1].strip()


def _solved(row: Row) -> tuple[str, str]:
    return row["solution"], row["answer"]


def _plain(row: Row) -> tuple[str, str]:
    return boxed(row["answer"]), _DOLLAR.sub("", row["answer"])


SETS: dict[str, Callable[[Row], tuple[str, str]]] = {
    "eval/math500": _solved,
    "eval/gsm8k": lambda row: (row["answer"], row["answer"].rpartition("#### ")[2]),
    "eval/aime24": lambda row: (
        row["solution"] if _BOX.search(row["solution"]) else boxed(row["answer"]),
        row["answer"],
    ),
    "eval/amc23": lambda row: (boxed(f"{row['answer']:g}"), str(row["answer"])),
    "eval/minerva_math": lambda row: (row["solution"], _last_box(row["solution"])),
    "eval/olympiadbench": lambda row: (boxed(row["final_answer"][0]), row["final_answer"][0].replace("$", "")),
    "eval/gaokao2023en": _plain,
    "eval/college_math": _plain,
    "train/math_lvl3to5_8k": _solved,
    "train/gsm8k": lambda row: (row["answer"], row["answer"].rpartition("#### ")[2]),
}
"""By data set: the function that takes (completion, gold) from a row."""
NO_GOLD = ("", "None")
"""Golds of rows without an answer; these rows are left out."""


def own_solutions(data: Path) -> dict[str, list[Item]]:
    """The items of every data set in the folder `data`: each solution with its gold. The kind is the set's name."""
    found = {}
    for name, read in SETS.items():
        path = data / f"{name}.jsonl"
        if path.exists():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            pairs = [read(row) for row in rows]
            found[name] = [Item(name, completion, (gold,), True) for completion, gold in pairs if gold not in NO_GOLD]
    return found


def rewritten(golds: Iterable[str], most: int) -> list[Item]:
    """Items for every gold: the gold itself, and at most `most` equal rewritings and `most` changed ones."""
    items = []
    for gold in golds:
        rng = random.Random(zlib.crc32(gold.encode()))
        items.append(Item("itself", boxed(gold), (gold,), True))
        for rules, expected in ((REWRITINGS, True), (CHANGES, False)):
            made = [(name, text) for name, rule in rules.items() if (text := rule(gold, rng)) and text != gold]
            for name, text in rng.sample(made, min(most, len(made))):
                items.append(Item(name, boxed(text), (gold,), expected))
    return items


def distinct_golds(sets: dict[str, list[Item]]) -> list[str]:
    """The golds of all data sets without duplicates, in a random order that is the same in every run."""
    golds = sorted({gold for items in sets.values() for item in items for gold in item.golds})
    random.Random(0).shuffle(golds)
    return golds
