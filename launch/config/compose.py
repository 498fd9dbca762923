"""Composes `configs/` with the overrides by Hydra, and turns Hydra's errors into one sentence each.

A setting of a dataclass may be set even if no YAML file mentions it. `launch/config/sections.py` refuses settings that
no dataclass has. Hydra's own settings cannot be set.
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
"""Folders of `configs/` that are no groups of Hydra: a setting names their files, as in `task.template=NAME`."""
GROUPS = tuple(
    sorted(
        path.name
        for path in CONFIG_DIR.iterdir()
        if path.is_dir() and path.name[0] not in "._" and path.name not in NO_GROUPS
    )
)


def compose_config(overrides: Sequence[str], known: Iterable[str]) -> DictConfig:
    """Compose configs/ with the overrides. The result also contains Hydra's own settings.

    Args:
        overrides: key=value, as typed.
        known: names of all top-level settings and sections.

    Raises:
        ValueError: one sentence on what is wrong with an override.
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


def run_sections(composed: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """The run's sections, without Hydra's own settings and with all references resolved.

    Raises:
        ValueError: a reference to a setting that does not exist.
    """
    try:
        container = OmegaConf.to_container(without_hydra(composed), resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(_one_sentence(error, overrides)) from error
    assert isinstance(container, dict)
    given = [setting_path(item) for item in overrides]
    return with_present_keys({str(key): value for key, value in container.items()}, given)


def renamed_notices(overrides: Iterable[str]) -> list[str]:
    """One sentence for every override with an old key."""
    renamed = [path for item in overrides if (path := _typed_path(item)) in RENAMED_KEYS]
    return [f"note: {path} is called {RENAMED_KEYS[path]}; the next release no longer knows {path}" for path in renamed]


def without_hydra(composed: DictConfig) -> DictConfig:
    """The composed configuration without Hydra's own settings."""
    return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])


def choices(composed: DictConfig) -> dict[str, str]:
    """The chosen file of every group."""
    return {str(group): str(name) for group, name in composed.hydra.runtime.choices.items()}


def unknown_setting(section: str, key: str, known: Iterable[str]) -> ValueError:
    """The error for an unknown setting; it names the most similar known ones, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(section + name for name in near)}?"
    if not near:
        hint = f"known settings are {', '.join(names)}"
    return ValueError(f"{section}{key} is not a known setting; {hint}")


def with_files(overrides: Sequence[str]) -> list[str]:
    """Replace every `config=FILE.yaml` by the file's settings, placed first so that the command line wins.

    Raises:
        ValueError: a file cannot be read, or contains no settings.
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
    """Dotted paths of the settings that the overrides set, without choices of a group's file."""
    return [path for item in overrides if (path := setting_path(item)) not in GROUPS]


def setting_path(item: str) -> str:
    """Dotted path of the setting that an override sets; an old key is replaced by the present one."""
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
    """One override for every value of a section, nested ones included."""
    found = []
    for key, value in section.items():
        name = f"{prefix}{key}"
        found += _flattened(value, f"{name}.") if isinstance(value, dict) and value else [f"{name}={_written(value)}"]
    return found


def _written(value: Any) -> str:
    """A value from a YAML file, written in the grammar of Hydra's overrides."""
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
    # In this grammar a backslash is an escape only before a quotation mark.
    quoted = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + (found[2] and "\\'"), str(value))
    return f"'{quoted}'"


def _implied(overrides: Sequence[str]) -> list[str]:
    """`model=path` if `model.path` is set and no file of configs/model is chosen."""
    values = dict(item.lstrip("+").partition("=")[::2] for item in overrides)
    return (
        ["model=path"] if values.get("model.path", "null") not in ("null", "", "???") and "model" not in values else []
    )


def _prepared(item: str, names: Sequence[str]) -> str:
    """The override for Hydra: with the present key, and with `++` so that it may set a key that no YAML file has."""
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
    present = sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))
    near = difflib.get_close_matches(option, present, n=1)
    hint = f"; did you mean {group}={near[0]}?" if near else ""
    return f"{group}={option} does not exist; configs/{group}/ offers {', '.join(present)}{hint}"


def _one_sentence(error: Exception, overrides: Sequence[str]) -> str:
    """The first line of Hydra's message, and the overrides."""
    text = str(error) or type(error).__name__
    typed = f" (in: {' '.join(overrides)})" if overrides else ""
    return f"{text.splitlines()[0].strip().rstrip('.')}{typed}; configs/ lists what can be set"
