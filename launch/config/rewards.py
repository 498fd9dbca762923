"""The run's rewards: the list at the top of the configuration, as every process of the run can build it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from buffer.config import read_section
from verifier.base import RewardSpec
from verifier.rewards.registry import absolute_name
from verifier.scoring.scorer import build_scorer


def read_rewards(value: Any) -> list[RewardSpec]:
    """The specs of `reward`, files by their absolute path: other processes may be started elsewhere.

    Raises:
        ValueError: one sentence, when it is no list of sections or a setting in one is wrong.
    """
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"reward={value} is no list of rewards; write for example reward=[{{name: accuracy}}]")
    specs = [read_section(RewardSpec, item, f"reward.{index}") for index, item in enumerate(value)]
    return [replace(spec, name=absolute_name(spec.name)) for spec in specs]


def check_rewards(rewards: Sequence[RewardSpec], *, is_multi_turn: bool) -> None:
    """Build what the scoring processes will build.

    Raises:
        ValueError: one sentence, when that fails, or a multi-turn task is given rewards.
    """
    if not is_multi_turn:
        build_scorer(rewards)
    elif rewards:
        raise ValueError(
            f"reward={[spec.name for spec in rewards]} would never be asked: the environment of a multi-turn task keeps"
            " its rewards itself; leave it empty, reward=[]"
        )
