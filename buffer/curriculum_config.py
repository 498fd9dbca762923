"""Settings of the curriculum and of the difficulty filter, with their checks. No state.

The launcher checks the stages before it starts any process, and writes each prompt's level to RUN_DIR/levels.json.
`buffer/ledger/curriculum.py` draws prompts accordingly. Messages count stages from 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LEVELS_FILE = "levels.json"


@dataclass(frozen=True)
class Stage:
    """One stage: which prompts are drawn, with which limits, and when the stage ends. 0: the setting is not used."""

    min_level: int = 0
    """Lowest level of the stage's prompts."""
    max_level: int = 0
    """Highest level of the stage's prompts."""
    samples_per_group: int = 0
    """Completions per prompt; 0: as in the run's configuration."""
    max_new_tokens: int = 0
    """Largest number of tokens per completion; 0: as in the run's configuration."""
    until_step: int = 0
    """The stage ends when the next batch is for this policy version or a later one."""
    until_success: float = 0.0
    """The stage ends when this share of the completions in its last `over_groups` groups is correct."""
    over_groups: int = 200
    at_least_steps: int = 0
    """Optimizer steps before which `until_success` does not end the stage."""
    at_most_steps: int = 0
    """Optimizer steps after which the stage ends in any case."""

    @property
    def has_levels(self) -> bool:
        """Whether the stage selects prompts by level."""
        return bool(self.min_level or self.max_level)

    @property
    def may_end(self) -> bool:
        """Whether the stage has a condition to end."""
        return bool(self.until_step or self.until_success or self.at_most_steps)

    def ends(self, next_version: int, began_version: int, successes: Sequence[float]) -> bool:
        """Return whether the stage is over.

        Args:
            next_version: policy version that the next batch is for.
            began_version: the value of `next_version` when the stage began.
            successes: share of correct completions of each of the stage's last groups, at most `over_groups` of them.
        """
        steps = next_version - began_version
        succeeds = self.until_success and len(successes) >= self.over_groups and steps >= self.at_least_steps
        return bool(
            (self.until_step and next_version >= self.until_step)
            or (self.at_most_steps and steps >= self.at_most_steps)
            or (succeeds and sum(successes) / len(successes) >= self.until_success)
        )


@dataclass(frozen=True)
class Skip:
    """Condition under which the difficulty filter passes a prompt over, from the stage's next epoch on."""

    success: float
    """Share of a group's completions that are correct: at least this counts as solved, at most this as unsolved."""
    seen: int = 0
    """Number of the prompt's latest groups that must all count as solved, or as unsolved; 0: the filter is off."""


def check_stages(stages: Sequence[Stage]) -> None:
    """Check that each stage can be reached and that all but the last one end.

    Raises:
        ValueError: one sentence that names the stage, the value and the way out.
    """
    reached = 0
    for number, stage in enumerate(stages, start=1):
        where = f"curriculum stage {number}"
        _check_numbers(where, stage)
        if number == len(stages) and stage.may_end:
            raise ValueError(
                f"{where} is the last one and goes on to the end of the run; leave out its until_step, until_success"
                " and at_most_steps"
            )
        if number < len(stages) and not stage.may_end:
            raise ValueError(f"{where} never ends; give it until_step, until_success or at_most_steps")
        if stage.until_step and stage.until_step <= reached:
            raise ValueError(
                f"{where} has until_step={stage.until_step}, but an earlier one lasts until step {reached}; let"
                " until_step grow from stage to stage"
            )
        reached = max(reached, stage.until_step)


def _check_numbers(where: str, stage: Stage) -> None:
    for field in fields(stage):
        value = getattr(stage, field.name)
        if value < 0:
            raise ValueError(f"{where} has {field.name}={value}; use 0 for no such setting, or more")
    if stage.max_level and stage.max_level < stage.min_level:
        raise ValueError(f"{where} has min_level={stage.min_level} above max_level={stage.max_level}; swap them")
    if stage.until_success > 1:
        raise ValueError(f"{where} has until_success={stage.until_success}; it is a share, so use at most 1")
    if stage.over_groups < 1:
        raise ValueError(f"{where} has over_groups={stage.over_groups}; it counts groups, so use at least 1")
    if stage.at_least_steps and not stage.until_success:
        raise ValueError(f"{where} has at_least_steps={stage.at_least_steps} without until_success, which it bounds")
    if 0 < stage.at_most_steps < stage.at_least_steps:
        raise ValueError(
            f"{where} has at_least_steps={stage.at_least_steps} above at_most_steps={stage.at_most_steps}; lower one"
        )


def check_skips(skip_solved: Skip, skip_unsolved: Skip, revisit_epochs: int) -> None:
    """Check the filter's settings.

    Raises:
        ValueError: one sentence that names the setting, the value and the way out.
    """
    for name, skip in (("skip_solved", skip_solved), ("skip_unsolved", skip_unsolved)):
        if not 0 <= skip.success <= 1:
            raise ValueError(f"buffer.{name}.success is {skip.success}; it is a share, so use 0 to 1")
        if skip.seen < 0:
            raise ValueError(f"buffer.{name}.seen is {skip.seen}; it counts groups, so use 0 (off) or more")
    if skip_solved.success <= skip_unsolved.success:
        raise ValueError(
            f"buffer.skip_solved.success {skip_solved.success} is not above buffer.skip_unsolved.success"
            f" {skip_unsolved.success}, so a group could be both; raise the first or lower the second"
        )
    if revisit_epochs < 0:
        raise ValueError(f"buffer.revisit_epochs is {revisit_epochs}; use 0 (never) or more")


def prompts_of(stage: Stage, levels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the prompt ids of a stage, ascending. `levels` is the level of every prompt."""
    wanted = (levels >= stage.min_level) & ((levels <= stage.max_level) | (stage.max_level == 0))
    return np.flatnonzero(wanted)


def write_levels(run_dir: Path, levels: Sequence[int]) -> None:
    """Write the level of every prompt to `run_dir`/levels.json, for the buffer. The write is atomic."""
    partial = run_dir / f"{LEVELS_FILE}.partial"
    partial.write_text(json.dumps(list(levels), separators=(",", ":")))
    partial.replace(run_dir / LEVELS_FILE)


def read_levels(run_dir: Path, num_prompts: int) -> NDArray[np.int64]:
    """Read the level of every prompt, [num_prompts] int64.

    Raises:
        ValueError: when the file cannot be read or has another number of prompts.
    """
    path = run_dir / LEVELS_FILE
    try:
        levels = np.asarray(json.loads(path.read_text()), np.int64)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; resume the run to have it written again") from error
    if levels.shape != (num_prompts,):
        raise ValueError(f"{path} has {levels.size} levels for {num_prompts} prompts; resume the run to write it again")
    return levels
