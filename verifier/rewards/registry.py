"""The registry of rewards: a name, and the factory that makes the reward from its options.

A factory takes the options of its `RewardSpec` and returns a `Grader` or a plain reward function. The project's own
stand in `answer.py`, `format.py` and `length.py`. A reward of one's own lies in any Python file, registered there or
not, and is named by path; the file is loaded once in every process that scores.
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
"""By name; those of a user's file by `FILE.py:NAME`."""
_FILE_SUFFIX = ".py"
_loading: list[str] = []
"""The file that is being loaded, whose registrations are its own."""


def register(name: str) -> Callable[[F], F]:
    """Registers a factory of a reward under `name`; in a file of one's own, under that file's `FILE.py:name`.

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
    """The names a configuration may use without a path, sorted."""
    return sorted(name for name in _REGISTRY if ":" not in name)


def find_factory(name: str) -> RewardFactory:
    """The factory that a configuration means by `name`.

    Raises:
        ValueError: in one sentence, when there is none, or its file cannot be loaded.
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
    """`name` with the path of its file, if it has one, counted from the root: good in every working directory."""
    place, _, attribute = name.rpartition(":")
    return f"{Path(place).expanduser().absolute()}:{attribute}" if place.endswith(_FILE_SUFFIX) else name


def _import(place: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    # A user's module may raise whatever it likes.
    except Exception as error:
        raise ValueError(
            f"reward: cannot import {place!r} for the reward {name!r} ({type(error).__name__}: {error}); give a file"
            " as FILE.py:NAME or an installed module"
        ) from error


@cache
def _load_file(path: str) -> ModuleType:
    """A user's file as a module of its own; what it registers is filed under its path.

    Raises:
        ValueError: when it does not exist or raises while it is loaded, a syntax error included.
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
    # What an earlier attempt left behind that failed half-way.
    for key in [key for key in _REGISTRY if key.startswith(f"{path}:")]:
        del _REGISTRY[key]
    _loading.append(path)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"reward: {error.filename} line {error.lineno} is not valid Python: {error.msg}") from error
    # It may raise whatever it likes, and may even ask to exit.
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"reward: {path} cannot be loaded ({type(error).__name__}: {error}); it must import without an error"
        ) from error
    finally:
        _loading.pop()
    return module
