"""Checks the stages of a curriculum against the run's other settings and its prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from buffer.config import read_section
from buffer.curriculum_config import Stage, check_stages, prompts_of
from launch.config.settings import RunConfig


def check_stage_settings(curriculum: Any) -> None:
    """Check that the value is a list of stages with known settings.

    Raises:
        ValueError: one sentence that names the stage and its setting.
    """
    if not isinstance(curriculum, list):
        raise ValueError(f"curriculum={curriculum} is no list of stages; write curriculum=[{{until_step:9}},{{}}]")
    for number, stage in enumerate(curriculum, start=1):
        if not isinstance(stage, dict):
            raise ValueError(f"curriculum stage {number} is {stage}, no settings; write {{NAME:VALUE,...}}")
        read_section(Stage, stage, f"curriculum stage {number}")


def check_curriculum(run: RunConfig, levels: NDArray[np.int64]) -> None:
    """Refuse stages that contradict each other, exceed the run's settings, have no prompts, or are never reached.

    Args:
        run: the top-level settings.
        levels: [training prompts] level of each prompt.

    Raises:
        ValueError: one sentence that names the stage, the value and the way out.
    """
    check_stages(run.curriculum)
    for number, stage in enumerate(run.curriculum, start=1):
        where = f"curriculum stage {number}"
        for name in ("samples_per_group", "max_new_tokens"):
            value, most = getattr(stage, name), getattr(run, name)
            # The run's settings size the engine, the context and the evaluation.
            if value > most:
                raise ValueError(f"{where} has {name}={value}, more than the run's {name}={most}; raise the run's")
        if stage.has_levels and not levels.any():
            raise ValueError(
                f"{where} draws {_described(stage)}, but the task's problems have no levels; choose a task with levels,"
                " or name the field of a data set that holds them, task.level_field=NAME"
            )
        if not prompts_of(stage, levels).size:
            raise ValueError(
                f"{where} draws {_described(stage)}, but the task has {_listed(levels)}; change the stage's levels"
            )
    _check_reached(run)


def _check_reached(run: RunConfig) -> None:
    """Refuse a stage whose earliest beginning is not before the end of the run."""
    begins = 0
    for number, stage in enumerate(run.curriculum[:-1], start=1):
        batches = math.ceil(stage.over_groups / run.groups_per_batch)
        ends = {
            f"until_step={stage.until_step}": stage.until_step,
            f"at_most_steps={stage.at_most_steps}": begins + stage.at_most_steps,
            f"over_groups={stage.over_groups} and at_least_steps={stage.at_least_steps}": begins
            + max(stage.at_least_steps, batches * run.updates_per_batch),
        }
        given = (stage.until_step, stage.at_most_steps, stage.until_success)
        step, setting = min((step, name) for (name, step), value in zip(ends.items(), given, strict=True) if value)
        begins = max(begins, step)
        if begins >= run.total_steps:
            raise ValueError(
                f"curriculum stage {number} has {setting} and so lasts until step {begins} or longer, but the run ends"
                f" at total_steps={run.total_steps}; lower the first or raise the second"
            )


def fewest_prompts(stages: Sequence[Stage], levels: NDArray[np.int64]) -> int:
    """Number of prompts of the smallest stage."""
    return min(prompts_of(stage, levels).size for stage in stages or [Stage()])


def _described(stage: Stage) -> str:
    return (
        f"levels {stage.min_level} and up" if not stage.max_level else f"levels {stage.min_level} to {stage.max_level}"
    )


def _listed(levels: NDArray[np.int64]) -> str:
    present = np.unique(levels).tolist()
    return ", ".join(map(str, present)) if len(present) < 12 else f"{present[0]} to {present[-1]}"
