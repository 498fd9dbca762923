"""The grid of `offpolicy.py`: which runs there are, in which order, and the lines they leave. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STALENESS: tuple[int | None, ...] = (0, 1, 2, 4, 8, 16, 32, None)
"""None: every batch is sampled by version 0, however old that gets."""
CORRECTIONS = ("clipped_tis", "decoupled_tis", "ppo_behavior", "token_mask", "vtrace", "none")


@dataclass(frozen=True)
class Cell:
    """One run."""

    algorithm: str
    correction: str
    staleness: int | None
    seed: int

    def overrides(self) -> list[str]:
        """On the launcher's command line."""
        return [f"algorithm={self.algorithm}", f"correction={self.correction}", f"seed={self.seed}"]

    def line(self) -> dict[str, Any]:
        """What names it in the results."""
        names = ("algorithm", "correction", "staleness", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Scale:
    """How large every run is."""

    updates: int = 64
    groups: int = 16
    samples: int = 4
    rate: float = 2.0
    """Factor on the default learning rates of policy and critic: twice the distance per version."""
    evaluate_every: int = 8
    evaluation_prompts: int = 200
    settings: tuple[str, ...] = ()
    """Further overrides, the same in every run."""

    def overrides(self) -> list[str]:
        """On the launcher's command line, all but `rate`."""
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
        """What names it in the results."""
        names = ("updates", "groups", "samples", "rate")
        return {name: getattr(self, name) for name in names} | {"settings": list(self.settings)}

    def made(self, line: dict[str, Any]) -> bool:
        """Whether a line of the results is of a run of this size."""
        return self.line().items() <= line.items()


def grid(algorithm: str, stale: Sequence[int | None], corrections: Sequence[str], seeds: int) -> Iterator[Cell]:
    """Seed by seed, so that a study that is ended early is balanced.

    At staleness 0 every weight is 1 and every correction the same loss: one correction stands for all.
    """
    for seed in range(seeds):
        for staleness in stale:
            for correction in corrections if staleness != 0 else corrections[-1:]:
                yield Cell(algorithm, correction, staleness, seed)


def missing(cells: Sequence[Cell], scale: Scale, lines: Sequence[dict[str, Any]]) -> list[Cell]:
    """The cells that no line is of."""
    return [
        cell for cell in cells if not any(scale.made(line) and cell.line().items() <= line.items() for line in lines)
    ]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The results so far; none where there is no file.

    Raises:
        ValueError: a line that is no result.
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
    """One result more."""
    # Unbuffered, in one piece: a study that is killed leaves no half line.
    with path.open("ab", buffering=0) as file:
        file.write(f"{json.dumps(line)}\n".encode())
