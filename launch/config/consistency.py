"""Refuses settings that contradict others or have no effect, and checks algorithm and correction."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

from hydra.errors import HydraException

from buffer.config import BufferConfig
from launch.config.compose import unknown_setting
from learner.config import LearnerConfig

COPIES = {
    **{f"learner.{name}": name for name in ("total_steps", "groups_per_batch", "samples_per_group", "seed")},
    **{f"learner.{name}": name for name in ("updates_per_batch", "temperature")},
    **{f"buffer.{name}": name for name in ("groups_per_batch", "updates_per_batch", "max_staleness", "seed")},
    **{f"actor.{name}": name for name in ("samples_per_group", "max_new_tokens", "temperature", "seed")},
    "actor.max_tokens": "model.max_tokens",
    "learner.publish_dtype": "actor.dtype",
}
"""Settings that copy another one, and the setting that they copy."""

COMPUTED = {
    "actor.model_path": "model.path",
    "buffer.address": "cluster.host and cluster.buffer_port",
    "buffer.data_fingerprint": "the section task",
    "buffer.max_tokens": "model.max_tokens",
    "buffer.num_batches": "total_steps",
    "buffer.num_prompts": "the section task",
    "buffer.run_dir": "run_dir",
    "buffer.samples_per_group": "samples_per_group",
    "buffer.stages": "curriculum",
    "buffer.vocab_size": "model.path",
    "learner.cpu_affinity": "cluster.pin_cores and cluster.learner_cores",
    "weights.address": "cluster.host and cluster.weights_port",
    "weights.group_size": "cluster.num_actors",
}
"""Settings that the launcher computes, and the settings that determine them."""

OPEN_SECTIONS = ("algorithm", "correction")
"""Sections whose settings are the parameters of the class in `_target_`."""

Sections = Mapping[str, Any]


def target_class(sections: Sections, section: str) -> type[Any]:
    """The class that a section's `_target_` names.

    Raises:
        ValueError: there is no such class.
    """
    target = str(sections[section].get("_target_"))
    module, _, name = target.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{section}._target_={target} cannot be imported ({error}); write MODULE.CLASS, or choose a file of"
            f" configs/{section}/ by {section}=NAME"
        ) from error
    if not isinstance(found, type):
        raise ValueError(f"{section}._target_={target} is not a class; write MODULE.CLASS")
    return found


def has_critic(sections: Sections) -> bool:
    """Whether the run's algorithm trains a critic."""
    return bool(getattr(target_class(sections, "algorithm"), "needs_critic", False))


NEEDS: dict[str, tuple[str, Callable[[Sections], bool]]] = {
    "buffer.max_no_signal": ("buffer.drop_no_signal=true", lambda s: bool(s["buffer"].get("drop_no_signal"))),
    "buffer.max_reissues": ("buffer.on_stale=drop", lambda s: s["buffer"].get("on_stale") == "drop"),
    "max_staleness": ("mode=async", lambda s: s["mode"] != "sync" or s["max_staleness"] == 0),
    "cluster.tensorboard_port": ("cluster.tensorboard=true", lambda s: bool(s["cluster"].get("tensorboard"))),
    "learner.critic_optimizer": ("an algorithm with a critic, such as algorithm=ppo", has_critic),
    "learner.critic_warmup_steps": ("an algorithm with a critic, such as algorithm=ppo", has_critic),
    "embedded": ("a model that is made here, such as model=tiny", lambda s: not s["model"].get("path")),
    "pretraining": ("a model that is made here, such as model=tiny", lambda s: not s["model"].get("path")),
    "verifier.max_retries": (
        "verifier.on_timeout=retry or verifier.on_error=retry",
        lambda s: "retry" in (s["verifier"].get("on_timeout"), s["verifier"].get("on_error")),
    ),
}
"""Settings and sections that only some runs read: what a run needs for them, and whether it has that."""


def setting(sections: Sections, path: str) -> Any:
    """The value at a dotted path; None if there is none."""
    value: Any = sections
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def check_consistency(sections: Sections, given: Iterable[str]) -> None:
    """Refuse a copy that differs from its source, a computed setting, and a setting that this run does not read.

    Args:
        sections: composed, before the launcher computes any setting.
        given: dotted paths of the settings that the user has set.

    Raises:
        ValueError: one sentence that names the setting to use instead.
    """
    for name, source in COPIES.items():
        value, wanted = setting(sections, name), setting(sections, source)
        if value is not None and value != wanted:
            raise ValueError(
                f"{name}={value} contradicts {source}={wanted}, from which it is copied; set {source} alone"
            )
    for name, source in COMPUTED.items():
        value = setting(sections, name)
        if value not in (None, "", []):
            raise ValueError(f"{name}={value} would be overwritten: it follows from {source}; leave it out")
    for path in given:
        for name, (need, has_it) in NEEDS.items():
            if f"{path}.".startswith(f"{name}.") and not has_it(sections):
                raise ValueError(f"{path}={setting(sections, path)} has no effect without {need}; leave it out")


def check_algorithm(sections: Sections, learner: LearnerConfig, buffer: BufferConfig) -> None:
    """Make the algorithm, and compare its group size with the run's.

    Raises:
        ValueError: a setting is unknown or wrong, or groups are too small for the algorithm or for `drop_no_signal`.
    """
    algorithm = _make_algorithm(sections)
    smallest = min(
        [learner.samples_per_group, *(stage.samples_per_group for stage in buffer.stages if stage.samples_per_group)]
    )
    if smallest < 2 and buffer.drop_no_signal:
        raise ValueError(
            f"samples_per_group={smallest} with buffer.drop_no_signal=true drops every group, because the rewards of a"
            " single completion are all equal; use 2 or more"
        )
    if smallest < algorithm.min_group_size:
        raise ValueError(
            f"samples_per_group={smallest} is too few for {type(algorithm).__name__}, which compares"
            f" the completions of a prompt; use {algorithm.min_group_size} or more"
        )


def _make_algorithm(sections: Sections) -> Any:
    from hydra.utils import instantiate

    try:
        for section in OPEN_SECTIONS:
            known = inspect.signature(target_class(sections, section)).parameters
            for key in sections[section]:
                if key not in ("_target_", *known):
                    raise unknown_setting(f"{section}.", key, known)
        if sections["algorithm"].get("correction") != sections["correction"]:
            raise ValueError("algorithm.correction is taken from the section correction; set correction.NAME=VALUE")
        return instantiate(sections["algorithm"])
    except HydraException as error:
        cause = error.__cause__ or error
        raise ValueError(str(cause).splitlines()[0]) from error
