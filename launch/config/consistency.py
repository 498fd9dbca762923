"""Refuses, by name, settings that repeat another one, that the launcher computes, or that this run does not read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

COPIES = {
    **{f"learner.{name}": name for name in ("total_steps", "groups_per_batch", "samples_per_group", "seed")},
    **{f"learner.{name}": name for name in ("updates_per_batch", "temperature")},
    **{f"buffer.{name}": name for name in ("groups_per_batch", "updates_per_batch", "max_staleness", "seed")},
    **{f"actor.{name}": name for name in ("samples_per_group", "max_new_tokens", "temperature", "seed")},
    "actor.max_tokens": "model.max_tokens",
    "learner.publish_dtype": "actor.dtype",
}
"""Settings of a section that the section takes from elsewhere, and where from."""

COMPUTED = {
    "actor.model_path": "model.path",
    "buffer.address": "cluster.host and cluster.buffer_port",
    "buffer.data_fingerprint": "the section task",
    "buffer.num_batches": "total_steps",
    "buffer.num_prompts": "the section task",
    "buffer.run_dir": "run_dir",
    "buffer.stages": "curriculum",
    "learner.cpu_affinity": "cluster.pin_cores and cluster.learner_cores",
    "weights.address": "cluster.host and cluster.weights_port",
    "weights.group_size": "cluster.num_actors",
}
"""Settings of a section that the launcher fills in, and what they follow from."""

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
        raise ValueError(f"{section}._target_={target} is no class; write MODULE.CLASS")
    return found


def has_critic(sections: Sections) -> bool:
    """Whether the run's algorithm trains a critic."""
    return bool(getattr(target_class(sections, "algorithm"), "needs_critic", False))


NEEDS: dict[str, tuple[str, Callable[[Sections], bool]]] = {
    "buffer.max_no_signal": ("buffer.drop_no_signal=true", lambda s: bool(s["buffer"].get("drop_no_signal"))),
    "buffer.max_reissues": ("buffer.on_stale=drop", lambda s: s["buffer"].get("on_stale") == "drop"),
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
"""Settings and sections that only some runs read: what they need, and whether a run has it."""


def setting(sections: Sections, path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    value: Any = sections
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def check_consistency(sections: Sections, given: Iterable[str]) -> None:
    """Refuse a copy that differs from its source, a computed setting, and a setting that this run does not read.

    Args:
        sections: composed, before anything is computed.
        given: dotted paths of the settings that the user has set.

    Raises:
        ValueError: one sentence with the name of the setting to use.
    """
    for name, source in COPIES.items():
        value, wanted = setting(sections, name), setting(sections, source)
        if value is not None and value != wanted:
            raise ValueError(
                f"{name}={value} contradicts {source}={wanted}, which it is taken from; set {source} alone"
            )
    for name, source in COMPUTED.items():
        value = setting(sections, name)
        if value not in (None, "", []):
            raise ValueError(f"{name}={value} would be overwritten: it follows from {source}; leave it out")
    for path in given:
        for name, (need, has_it) in NEEDS.items():
            if f"{path}.".startswith(f"{name}.") and not has_it(sections):
                raise ValueError(f"{path}={setting(sections, path)} has no effect without {need}; leave it out")
