"""The sections of a configuration and the dataclass of each; unknown settings are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

from actors.config import ActorConfig
from actors.tasks.task import TaskConfig
from buffer.config import BufferConfig, read_section
from buffer.weights.config import WeightsConfig
from launch.config.compose import unknown_setting
from launch.config.consistency import OPEN_SECTIONS
from launch.config.curriculum import check_stage_settings
from launch.config.settings import ClusterConfig, DataConfig, EmbeddedConfig, PretrainingConfig, RunConfig
from learner.config import LearnerConfig, ModelConfig
from verifier.base import RewardSpec
from verifier.config import VerifierConfig
from verifier.rewards.registry import absolute_name

SECTIONS: dict[str, type[Any]] = {
    "data": DataConfig,
    "task": TaskConfig,
    "model": ModelConfig,
    "embedded": EmbeddedConfig,
    "pretraining": PretrainingConfig,
    "learner": LearnerConfig,
    "buffer": BufferConfig,
    "actor": ActorConfig,
    "verifier": VerifierConfig,
    "weights": WeightsConfig,
    "cluster": ClusterConfig,
}
OPTIONAL = ("data", "embedded", "pretraining")
TOP_LEVEL = tuple(f.name for f in fields(RunConfig))
KNOWN = (*TOP_LEVEL, *SECTIONS, *OPEN_SECTIONS)
RECORDED = ("choices", "overrides")
"""Keys that the launcher adds to config.yaml, for a later resume: the chosen files of configs/ and the overrides."""


def read_top_level(sections: Mapping[str, Any]) -> RunConfig:
    """Read the settings at the top of the configuration.

    Raises:
        ValueError: a setting or section is unknown, missing or wrong.
    """
    for key in sections:
        if key not in (*KNOWN, *RECORDED):
            raise unknown_setting("", key, KNOWN)
    missing = [key for key in KNOWN if key not in (*OPTIONAL, "run_dir") and sections.get(key) is None]
    if missing:
        raise ValueError(f"{missing[0]} has no value; leave it as configs/ has it, or set it")
    check_stage_settings(sections["curriculum"])
    read_rewards(sections["reward"])
    try:
        return read_section(RunConfig, {key: sections[key] for key in TOP_LEVEL if key in sections}, "")
    except ValueError as error:
        raise ValueError(str(error).removeprefix(".")) from error


def check_setting_names(sections: Mapping[str, Any]) -> None:
    """Refuse unknown settings of all sections, before any value is checked.

    Raises:
        ValueError: one sentence with the name of the setting.
    """
    for section, cls in SECTIONS.items():
        known, values = {f.name for f in fields(cls)}, sections.get(section) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{section}={values} is no section; set one of its settings, {section}.NAME=VALUE")
        for key in values:
            if key not in known:
                raise unknown_setting(f"{section}.", key, known)
    if sections.get("data"):
        read_section(DataConfig, sections["data"], "data")


def read_rewards(value: Any) -> list[RewardSpec]:
    """The specs of `reward`, with absolute paths of files, since processes may start in other folders.

    Raises:
        ValueError: one sentence if the value is not a list of sections, or a setting in one is wrong.
    """
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"reward={value} is no list of rewards; write for example reward=[{{name: accuracy}}]")
    specs = [read_section(RewardSpec, item, f"reward.{index}") for index, item in enumerate(value)]
    return [replace(spec, name=absolute_name(spec.name)) for spec in specs]


def read_only(sections: Mapping[str, Any]) -> Mapping[str, Any]:
    """A view of the sections that refuses writes, to a section too."""
    views = {name: MappingProxyType(value) if isinstance(value, dict) else value for name, value in sections.items()}
    return MappingProxyType(views)


def writable(sections: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the sections as plain dicts."""
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in sections.items()}
