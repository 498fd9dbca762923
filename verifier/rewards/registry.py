"""The registry of rewards: maps a name to the factory that makes the reward.

A factory takes the options of its `RewardSpec` and returns a `Grader` or a plain reward function. Only a call of
`register` adds a factory to the registry; importing this module registers nothing. `answer.py`, `format.py` and
`length.py` register the built-in rewards; `verifier.scoring.scorer` imports them.

A user's reward stands in any Python file and is named `FILE.py:NAME`, registered or not. Every process that scores
loads the file once.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from verifier.base import Reward

RewardFactory = Callable[..., Reward]
F = TypeVar("F", bound=RewardFactory)

_REGISTRY: dict[str, RewardFactory] = {}
"""Factories by name; a factory that a user's file registers has the key `FILE.py:NAME`."""
_FILE_SUFFIX = ".py"
_loading: list[str] = []
"""Paths of the user's files being loaded, innermost last. `register` puts the innermost before the name."""


def register(name: str) -> Callable[[F], F]:
    """Returns a decorator that registers a reward's factory under `name`; in a user's file under `FILE.py:name`.

    Raises:
        ValueError: when the name is taken or contains a colon.
    """

    def add(factory: F) -> F:
        key = f"{_loading[-1]}:{name}" if _loading else name
        if key in _REGISTRY or ":" in name:
            raise ValueError(f"the reward name {name!r} is taken or contains a colon; choose another")
        _REGISTRY[key] = factory
        return factory

    return add


def registered_names() -> list[str]:
    """The names that need no path in a configuration, sorted."""
    return sorted(name for name in _REGISTRY if ":" not in name)


def find_factory(name: str) -> RewardFactory:
    """Returns the factory for a name of the configuration; loads its file or module if it is not registered yet.

    Raises:
        ValueError: with one sentence, when there is no such factory or its file cannot be loaded.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    place, colon, attribute = absolute_name(name).rpartition(":")
    if not colon:
        near = difflib.get_close_matches(name, registered_names(), n=1)
        hint = f"did you mean {near[0]}? There are" if near else "choose one of"
        raise ValueError(
            f"reward: unknown reward {name!r}; {hint} {', '.join(registered_names())}, or name one of your own as"
            " FILE.py:NAME"
        )
    module = _load_file(place) if place.endswith(_FILE_SUFFIX) else _import(place, name)
    factory = _REGISTRY.get(f"{place}:{attribute}") or vars(module).get(attribute)
    if not callable(factory):
        raise ValueError(f"reward: {place} has no function {attribute!r}, which the reward {name!r} names; check both")
    found: RewardFactory = factory
    return found


def absolute_name(name: str) -> str:
    """`name` with an absolute path where it names a file, so that it is valid in every working directory."""
    place, _, attribute = name.rpartition(":")
    return f"{Path(place).expanduser().absolute()}:{attribute}" if place.endswith(_FILE_SUFFIX) else name


def _import(place: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    # A user's module may raise any exception.
    except Exception as error:
        raise ValueError(
            f"reward: cannot import {place!r} for the reward {name!r} ({type(error).__name__}: {error}); give a file"
            " as FILE.py:NAME or an installed module"
        ) from error


@cache
def _load_file(path: str) -> ModuleType:
    """Imports a user's file as a module. Its calls of `register` enter the registry under its path.

    Raises:
        ValueError: when the file does not exist, has a syntax error, or raises while it is imported.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"reward: the file {path} does not exist; a relative path counts from where the run is started"
        )
    spec = importlib.util.spec_from_file_location(f"reward_file_{len(sys.modules)}_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    # An earlier load may have failed after it registered some names.
    for key in [key for key in _REGISTRY if key.startswith(f"{path}:")]:
        del _REGISTRY[key]
    _loading.append(path)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"reward: {error.filename} line {error.lineno} is not valid Python: {error.msg}") from error
    # A user's file may raise any exception, and may call sys.exit.
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"reward: {path} cannot be loaded ({type(error).__name__}: {error}); it must import without an error"
        ) from error
    finally:
        _loading.pop()
    return module
