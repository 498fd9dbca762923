"""The buffer's settings, and `read_section`, which turns a section of the configuration into a frozen dataclass.

Every process reads its sections with `read_section`. Only the launcher uses Hydra; all other code sees frozen
dataclasses, whose `__post_init__` checks the rules between fields. Every error is one sentence that names the section,
the key, the value and the way out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from buffer.curriculum_config import Skip, Stage, check_skips, check_stages
from buffer.ledger.admission import Limits
from buffer.ledger.sampler import SAMPLERS

T = TypeVar("T")

DURABILITIES = ("full", "normal", "memory")
ON_STALE = ("wait", "drop", "mask")

MOVED_MODULES = {
    "learner.cispo": "learner.algorithms.cispo",
    "learner.corrections": "learner.algorithms.corrections",
    "learner.grpo": "learner.algorithms.grpo",
    "learner.gspo": "learner.algorithms.gspo",
    "learner.ppo": "learner.algorithms.ppo",
    "learner.reinforce_pp": "learner.algorithms.reinforce_pp",
}
"""The current path of each module that an older run's configuration may name by its previous path."""
RENAMED_KEYS = {
    f"learner.{section}.{old}": f"learner.{section}.{new}"
    for section in ("optimizer", "critic_optimizer")
    for old, new in (("clip_norm", "max_grad_norm"), ("floor", "min_lr_ratio"))
} | {"weights.meeting_seconds": "weights.rendezvous_seconds"}
"""Old keys that this release still accepts, each with the key of the same section that replaces it."""


@dataclass(frozen=True)
class BufferConfig:
    """The section `buffer`. Versions and staleness are counted in optimizer steps.

    Raises:
        ValueError: when a value is out of range or two fields contradict each other.
    """

    run_dir: str
    """The ledger is `run_dir`/ledger.sqlite."""
    address: str
    """Address of the buffer. Other machines can connect only if the run has keys."""
    num_prompts: int
    data_fingerprint: str
    """Hash of all prompts. Actors with other prompts are refused."""
    groups_per_batch: int
    max_staleness: int
    """Largest staleness of a group at hand-out, that is at the first optimizer step of its batch. The last step is
    updates_per_batch - 1 versions later. 0: generation and training strictly alternate."""
    updates_per_batch: int = 1
    """Optimizer steps that the learner makes with one batch."""
    num_batches: int = 0
    """Number of batches in the run; 0: no end."""
    max_uses: int = 1
    """Number of batches that one group may be in, within max_staleness."""
    sampler: str = "fifo"
    """How a batch chooses groups beyond those that would become too stale: fifo, uniform, freshest or prioritized."""
    on_stale: str = "wait"
    """What happens to a group that would exceed max_staleness. wait: the learner waits for the group's delivery, so
    that the group is trained on in time. drop: the group is dropped and its prompt sampled again. mask: the group's
    tokens that are too stale are left out of the loss."""
    max_reissues: int = 1
    """How often a prompt is sampled again because its group was too stale, before the prompt is dropped. Not used with
    on_stale=wait."""
    drop_no_signal: bool = False
    """Whether to drop a delivered group whose rewards are all equal and sample another prompt instead."""
    max_no_signal: int = 1000
    """Number of consecutive groups dropped by drop_no_signal after which the run ends; 0: no limit."""
    vocab_size: int = 0
    """Number of the model's token ids; 0: not checked, as with the next two. A delivered group beyond one of the three
    is refused."""
    max_tokens: int = 0
    """Largest number of tokens in a trajectory."""
    samples_per_group: int = 0
    """Largest number of trajectories in a group, over all stages."""
    lease_seconds: float = 60.0
    """Silence after which an actor loses its leases."""
    durability: str = "normal"
    """What a power failure may lose. full: nothing that was acknowledged; normal: the latest transactions; memory: all
    that the operating system has not written yet. With all three a killed process loses nothing."""
    shuffle: bool = True
    """Whether each epoch draws its prompts in a random order."""
    seed: int = 0
    stages: list[Stage] = field(default_factory=list)
    """The curriculum; empty: one stage with all prompts. Levels are read from `run_dir`/levels.json."""
    skip_solved: Skip = field(default_factory=lambda: Skip(success=1.0))
    """The prompts to pass over because they are always solved."""
    skip_unsolved: Skip = field(default_factory=lambda: Skip(success=0.0))
    """The prompts to pass over because they are never solved."""
    revisit_epochs: int = 0
    """Interval, in epochs of a stage, at which an epoch draws every prompt of the stage; 0: never."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "groups_per_batch", "updates_per_batch", "max_uses"):
            if getattr(self, name) < 1:
                raise ValueError(f"buffer.{name} is {getattr(self, name)}; it must be at least 1")
        for name in (
            *("num_batches", "seed", "max_reissues", "max_no_signal"),
            *("vocab_size", "max_tokens", "samples_per_group"),
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"buffer.{name} is {getattr(self, name)}; it must be at least 0")
        if self.max_staleness < 0:
            raise ValueError(f"buffer.max_staleness is {self.max_staleness}; use 0 for strictly in turn, or more")
        if 0 < self.max_staleness < self.updates_per_batch:
            raise ValueError(
                f"buffer.max_staleness {self.max_staleness} is below buffer.updates_per_batch {self.updates_per_batch}"
                f" and would act like 0; set max_staleness to 0, or to {self.updates_per_batch} or more"
            )
        if not self.lease_seconds > 0:
            raise ValueError(f"buffer.lease_seconds is {self.lease_seconds}; it must be above 0")
        if self.durability not in DURABILITIES:
            raise ValueError(f"buffer.durability is {self.durability!r}; choose one of {', '.join(DURABILITIES)}")
        self._check_replay()
        check_stages(self.stages)
        check_skips(self.skip_solved, self.skip_unsolved, self.revisit_epochs)

    def _check_replay(self) -> None:
        for name, choices in (("sampler", tuple(SAMPLERS)), ("on_stale", ON_STALE)):
            if getattr(self, name) not in choices:
                raise ValueError(f"buffer.{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        num_slots = self.limits.num_slots
        if self.max_uses > num_slots:
            raise ValueError(
                f"buffer.max_uses is {self.max_uses}, but with max_staleness {self.max_staleness} and updates_per_batch"
                f" {self.updates_per_batch} a group is fresh enough for {num_slots} batches at most; lower max_uses, or"
                f" raise max_staleness to {(self.max_uses - 1) * self.updates_per_batch} or more"
            )
        for name, inert in (("sampler", "fifo"), ("on_stale", "wait")):
            if self.max_staleness == 0 and getattr(self, name) != inert:
                raise ValueError(
                    f"buffer.{name} is {getattr(self, name)!r}, but with max_staleness 0 (or mode=sync) every batch"
                    f" consists of all groups, none too stale; leave it at {inert}, or raise max_staleness"
                )

    @property
    def limits(self) -> Limits:
        """The constants of the admission rule."""
        return Limits(self.max_staleness, self.groups_per_batch, self.updates_per_batch, self.max_uses)


def read_section(cls: type[T], mapping: Mapping[str, Any], section: str) -> T:
    """Build an instance of the frozen dataclass `cls`, and of nested dataclasses, from `mapping`.

    Args:
        cls: a dataclass of types that OmegaConf knows: int, float, str, bool, tuples, lists, dicts, dataclasses, and
            optional ones of these.
        mapping: the section's keys and values. Absent keys take the dataclass's defaults.
        section: the section's name in error messages.

    Raises:
        ValueError: for an unknown, missing or ill-typed key, or a broken rule; one sentence that names `section.key`.
    """
    try:
        merged = OmegaConf.merge(_writable(cls), OmegaConf.create(dict(mapping)))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ValueError(f"{section}.{missing[0]} is missing; set it")
        return cast(T, _build(cls, OmegaConf.to_container(merged, resolve=True)))
    except OmegaConfBaseException as error:
        raise ValueError(_sentence(cls, section, error)) from error


def _writable(cls: type[Any]) -> DictConfig:
    """Return the schema of `cls`, made writable.

    OmegaConf makes frozen dataclasses read-only and then refuses to merge.
    """
    schema: DictConfig = OmegaConf.structured(cls)
    OmegaConf.set_readonly(schema, None)
    for name, wanted in get_type_hints(cls).items():
        if is_dataclass(wanted) and isinstance(wanted, type):
            nested, absent = _writable(wanted), OmegaConf.is_missing(schema, name)
            schema[name] = nested if absent else OmegaConf.merge(nested, OmegaConf.to_container(schema[name]))
    return schema


def _build(cls: type[Any], values: Any) -> Any:
    """Return an instance of `cls`. Unlike OmegaConf's own conversion, tuples stay tuples."""
    wanted = get_type_hints(cls)
    return cls(**{name: _convert(wanted[name], value) for name, value in values.items()})


def _convert(wanted: Any, value: Any) -> Any:
    if is_dataclass(wanted) and isinstance(wanted, type):
        return _build(wanted, value)
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin is list and is_dataclass(arguments[0]):
        return [_convert(arguments[0], item) for item in value]
    return tuple(value) if origin is tuple else value


def _sentence(cls: type[Any], section: str, error: OmegaConfBaseException) -> str:
    key = f"{section}.{error.full_key}" if error.full_key else section
    reason = str(error.msg or error).splitlines()[0]
    if error.parent_node is not None and "not in" in reason:
        holder = OmegaConf.get_type(error.parent_node) or cls
        known = ", ".join(sorted(f.name for f in fields(holder))) if hasattr(holder, "__dataclass_fields__") else ""
        return f"{key} is not a known setting; the settings there are {known}"
    return f"{key} is not valid: {reason}"


def load_run_config(run_dir: str | Path) -> dict[str, Any]:
    """Load the resolved configuration that the launcher wrote to `run_dir`/config.yaml.

    Class paths and keys that an older release wrote are replaced by the current ones.

    Raises:
        ValueError: when the file is missing, cannot be read or is not a mapping.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the directory of a run that was started")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds no mapping; restore the file the launcher wrote")
    return with_present_keys({str(key): _with_present_classes(value) for key, value in loaded.items()})


def with_present_keys(sections: Mapping[str, Any], settled: Collection[str] = ()) -> dict[str, Any]:
    """Return a copy of `sections` in which every key of `RENAMED_KEYS` has its current name.

    Args:
        sections: a whole configuration, as plain mappings.
        settled: current keys, with their sections, that keep their value. Any other current key takes the value of its
            old key: no file in configs/ has an old key, so a user set it on purpose.
    """
    return {key: _with_present_keys(value, f"{key}.", settled) for key, value in sections.items()}


def _with_present_keys(value: Any, path: str, settled: Collection[str]) -> Any:
    if not isinstance(value, dict):
        return value
    present = {
        key: _with_present_keys(item, f"{path}{key}.", settled)
        for key, item in value.items()
        if f"{path}{key}" not in RENAMED_KEYS
    }
    for key, item in value.items():
        new = RENAMED_KEYS.get(f"{path}{key}")
        if new is not None and new not in settled:
            present[new.rpartition(".")[2]] = item
    return present


def _with_present_classes(value: Any, key: Any = None) -> Any:
    """Return `value` with the current class path in every `_target_`, at any depth."""
    if isinstance(value, dict):
        return {name: _with_present_classes(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_present_classes(item) for item in value]
    if key != "_target_" or not isinstance(value, str):
        return value
    module, dot, name = value.rpartition(".")
    return f"{MOVED_MODULES.get(module, module)}{dot}{name}"
