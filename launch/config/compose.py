"""From overrides to plain sections: Hydra composes `configs/`, and whatever is wrong becomes one sentence.

A setting that a frozen dataclass knows may be set although no YAML file mentions it; `launch/config/plan.py` refuses
those that none knows. Hydra's own settings are no settings of a run.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from buffer.config import RENAMED_KEYS, with_present_keys

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
NO_GROUPS = ("template",)
"""Folders of `configs/` whose files a setting names: `task.template=NAME`."""
GROUPS = tuple(
    sorted(
        path.name
        for path in CONFIG_DIR.iterdir()
        if path.is_dir() and path.name[0] not in "._" and path.name not in NO_GROUPS
    )
)


def compose_config(overrides: Sequence[str], known: Iterable[str]) -> DictConfig:
    """Hydra's composition of configs/ with the overrides, Hydra's own settings included.

    Args:
        overrides: key=value, as typed.
        known: the settings and sections at the top.

    Raises:
        ValueError: one sentence for whatever is wrong with an override.
    """
    names = sorted({*known, *GROUPS})
    prepared = [_prepared(item, names) for item in (*overrides, *_implied(overrides))]
    try:
        with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
            config: DictConfig = compose("config", overrides=prepared, return_hydra_config=True)
    except MissingConfigException as error:
        raise ValueError(_missing_option(error)) from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ValueError(_one_sentence(error, overrides)) from error
    return config


def own_sections(composed: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """Everything but Hydra's own settings, resolved.

    Raises:
        ValueError: a reference to a setting that is not there.
    """
    try:
        container = OmegaConf.to_container(without_hydra(composed), resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(_one_sentence(error, overrides)) from error
    assert isinstance(container, dict)
    settled = [setting_path(item) for item in overrides]
    return with_present_keys({str(key): value for key, value in container.items()}, settled)


def renamed_notices(overrides: Iterable[str]) -> list[str]:
    """One sentence for every override that was typed with an old key."""
    renamed = [path for item in overrides if (path := _typed_path(item)) in RENAMED_KEYS]
    return [f"note: {path} is called {RENAMED_KEYS[path]}; the next release no longer knows {path}" for path in renamed]


def without_hydra(composed: DictConfig) -> DictConfig:
    """The run's configuration as it stands in `configs/`."""
    return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])


def choices(composed: DictConfig) -> dict[str, str]:
    """Which file of each group was taken."""
    return {str(group): str(name) for group, name in composed.hydra.runtime.choices.items()}


def unknown_setting(section: str, key: str, known: Iterable[str]) -> ValueError:
    """The error for a setting nobody reads, with the nearest that exist, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=2, cutoff=0.6)
    there = f"did you mean {' or '.join(section + name for name in near)}?"
    if not near:
        there = f"the settings there are {', '.join(names)}"
    return ValueError(f"{section}{key} is not a known setting; {there}")


def with_files(overrides: Sequence[str]) -> list[str]:
    """The overrides with what stands in the files of `config=FILE.yaml` before them, so that the command line wins.

    Raises:
        ValueError: a file that cannot be read, or holds no settings.
    """
    found, typed = [], []
    for item in overrides:
        key, _, value = item.partition("=")
        if key == "config":
            found += _read_file(Path(value).expanduser())
        else:
            typed.append(item)
    return [*found, *typed]


def given_settings(overrides: Sequence[str]) -> list[str]:
    """Dotted paths of the settings that the overrides set; choices of a group's file are none."""
    return [path for item in overrides if (path := setting_path(item)) not in GROUPS]


def setting_path(item: str) -> str:
    """Dotted path of the setting that an override sets, with its present key where an old one was typed."""
    path = _typed_path(item)
    return RENAMED_KEYS.get(path, path)


def _read_file(path: Path) -> list[str]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"config={path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config={path} holds no settings; write NAME: VALUE lines, with the names of configs/")
    if "choices" in content:
        raise ValueError(
            f"config={path} is what a run wrote for its processes; continue that run with resume={path.parent}, or"
            " write a file of the settings that differ from configs/"
        )
    return _flattened(content, "")


def _flattened(section: dict[Any, Any], prefix: str) -> list[str]:
    """One override for every value of a section and those in it."""
    found = []
    for key, value in section.items():
        name = f"{prefix}{key}"
        found += _flattened(value, f"{name}.") if isinstance(value, dict) and value else [f"{name}={_written(value)}"]
    return found


def _written(value: Any) -> str:
    """A value of a YAML file in the grammar of Hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_written(item)}' for key, item in value.items())}}}"
    if isinstance(value, int | float):
        return str(value)
    # Backslashes count only before a quotation mark.
    quoted = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + (found[2] and "\\'"), str(value))
    return f"'{quoted}'"


def _implied(overrides: Sequence[str]) -> list[str]:
    """`model=path` where `model.path` is set and no file of configs/model is chosen."""
    values = dict(item.lstrip("+").partition("=")[::2] for item in overrides)
    return (
        ["model=path"] if values.get("model.path", "null") not in ("null", "", "???") and "model" not in values else []
    )


def _prepared(item: str, names: Sequence[str]) -> str:
    """The override for Hydra, with the present key, and the sign that lets it set what no YAML file mentions."""
    key, separator, _ = item.partition("=")
    if key.startswith("~"):
        raise ValueError(f"{item} would remove what the processes need; set another value with key=value")
    if not separator:
        raise ValueError(f"{item!r} is not of the form key=value; write for example total_steps=10")
    path = _typed_path(item)
    root = path.partition(".")[0]
    if root not in names:
        raise unknown_setting("", root, names)
    item = item.replace(path, setting_path(item), 1)
    return f"++{item}" if "." in path and path == key else item


def _typed_path(item: str) -> str:
    return item.partition("=")[0].lstrip("+")


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    there = sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))
    near = difflib.get_close_matches(option, there, n=1)
    hint = f"; did you mean {group}={near[0]}?" if near else ""
    return f"{group}={option} does not exist; configs/{group}/ offers {', '.join(there)}{hint}"


def _one_sentence(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's first line, with what was typed."""
    text = str(error) or type(error).__name__
    typed = f" (in: {' '.join(overrides)})" if overrides else ""
    return f"{text.splitlines()[0].strip().rstrip('.')}{typed}; configs/ lists what can be set"
