"""The grid of `benchmarks/offpolicy.py`: its runs, their order, and the file of results. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STALENESS: tuple[int | None, ...] = (0, 1, 2, 4, 8, 16, 32, None)
"""In policy versions; None (unbounded): version 0 samples every batch."""
CORRECTIONS = ("clipped_tis", "decoupled_tis", "ppo_behavior", "token_mask", "vtrace", "none")


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    algorithm: str
    correction: str
    staleness: int | None
    seed: int

    def overrides(self) -> list[str]:
        """Overrides for the launcher's command line."""
        return [f"algorithm={self.algorithm}", f"correction={self.correction}", f"seed={self.seed}"]

    def line(self) -> dict[str, Any]:
        """Fields that identify the cell in a line of the results."""
        names = ("algorithm", "correction", "staleness", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Scale:
    """The size of every run."""

    updates: int = 64
    groups: int = 16
    samples: int = 4
    rate: float = 2.0
    """Factor on the default learning rates of policy and critic. At 2 a version is about twice as far from the last."""
    evaluate_every: int = 8
    evaluation_prompts: int = 200
    settings: tuple[str, ...] = ()
    """Further overrides of every run."""

    def overrides(self) -> list[str]:
        """Overrides for the launcher's command line, without `rate`."""
        return [
            f"total_steps={self.updates}",
            f"groups_per_batch={self.groups}",
            f"samples_per_group={self.samples}",
            f"learner.evaluate_every={self.evaluate_every}",
            f"learner.checkpoint_every={self.updates}",
            f"actor.evaluation_prompts={self.evaluation_prompts}",
            *self.settings,
        ]

    def line(self) -> dict[str, Any]:
        """Fields that identify the size in a line of the results."""
        names = ("updates", "groups", "samples", "rate")
        return {name: getattr(self, name) for name in names} | {"settings": list(self.settings)}

    def made(self, line: dict[str, Any]) -> bool:
        """Whether a line of the results comes from a run of this size."""
        return self.line().items() <= line.items()


def grid(algorithm: str, stale: Sequence[int | None], corrections: Sequence[str], seeds: int) -> Iterator[Cell]:
    """Yields all cells of the first seed, then of the second and so on, so that a study that is stopped is balanced.

    At staleness 0 every importance weight is 1, so every correction has the same loss, and one of them is run for all.
    """
    for seed in range(seeds):
        for staleness in stale:
            for correction in corrections if staleness != 0 else corrections[-1:]:
                yield Cell(algorithm, correction, staleness, seed)


def missing(cells: Sequence[Cell], scale: Scale, lines: Sequence[dict[str, Any]]) -> list[Cell]:
    """The cells without a result."""
    return [
        cell for cell in cells if not any(scale.made(line) and cell.line().items() <= line.items() for line in lines)
    ]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the results so far; none when the file does not exist.

    Raises:
        ValueError: when a line is not JSON.
    """
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is no result: {error}; remove the line") from error
    return lines


def add_line(path: Path, line: dict[str, Any]) -> None:
    """Append one result."""
    # One unbuffered write, so that a killed study leaves no incomplete line.
    with path.open("ab", buffering=0) as file:
        file.write(f"{json.dumps(line)}\n".encode())
