"""Resumes a run: its configuration from config.yaml, with changes to the settings that may change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.config.compose import GROUPS, setting_path
from launch.config.consistency import COPIES, Sections, setting
from learner.checkpoints.manifest import newest_checkpoint

CHANGEABLE = (
    "total_steps",
    *(f"learner.{name}" for name in ("evaluate_every", "evaluation_timeout_seconds")),
    *(f"learner.{name}" for name in ("tokens_per_microbatch", "checkpoint_every", "keep_checkpoints", "max_bad_steps")),
    *(f"learner.{name}" for name in ("max_batches_without_signal", "logprob_tolerance")),
    *(f"actor.{name}" for name in ("max_groups_in_flight", "kv_cache_gib", "gpu_memory_utilization")),
    *(f"actor.{name}" for name in ("tensor_parallel_size", "heartbeat_seconds", "weights_timeout_seconds")),
    *(f"actor.{name}" for name in ("sample_timeout_seconds", "chunk_bytes", "share_files")),
    *(f"actor.evaluation_{name}" for name in ("prompts", "temperature", "max_new_tokens")),
    *(f"verifier.{name}" for name in ("num_workers", "deadline_seconds", "memory_bytes", "max_retries")),
    *(f"buffer.{name}" for name in ("lease_seconds", "durability", "max_no_signal", "max_reissues")),
    *(
        f"weights.{name}"
        for name in ("shared_memory", "keep_versions", "bytes_per_second", "concurrent_pulls", "relay_fanout", "deltas")
    ),
    *(f"cluster.{name}" for name in ("num_actors", "relays", "host", "buffer_port", "weights_port", "pin_cores")),
    *(f"cluster.{name}" for name in ("learner_cores", "separate_devices", "max_restarts", "healthy_seconds")),
    *(f"cluster.{name}" for name in ("hung_seconds", "grace_seconds", "tensorboard", "tensorboard_port")),
    *("cluster.min_free_bytes", "model.gradient_checkpointing"),
)
"""Settings that a resumed run may change: they do not change what it computes, except its length and evaluation."""


def new_overrides(sections: Sections, overrides: Sequence[str]) -> list[str]:
    """The overrides that are not among those the run was started with."""
    return [item for item in overrides if item not in (sections.get("overrides") or [])]


def apply_changes(sections: dict[str, Any], overrides: Sequence[str], wanted: Sections, run_dir: Path) -> None:
    """Set the settings of the overrides in `sections`. An override that equals the run's value changes nothing.

    Args:
        sections: the run's configuration; changed in place.
        overrides: key=value, without resume and run_dir.
        wanted: composition of configs/ with the overrides, with the chosen files in `choices`.
        run_dir: of the run.

    Raises:
        ValueError: an override would change a setting that may not change.
    """
    for item in overrides:
        path = setting_path(item)
        name = f"choices.{path}" if path in GROUPS else path
        has, wants = setting(sections, name), setting(wanted, name)
        if has == wants:
            continue
        if path not in CHANGEABLE:
            raise ValueError(
                f"resume={run_dir} cannot change {path}, which is {has} there and {wants} here; start a new run with"
                " it, or leave it out (docs/configuration.md lists what may change)"
            )
        if path == "total_steps":
            _check_steps(run_dir, wants)
        for target in (path, *(copy for copy, source in COPIES.items() if source == path)):
            _set(sections, target, wants)


def _check_steps(run_dir: Path, wants: Any) -> None:
    newest = newest_checkpoint(run_dir / "checkpoints")
    done = int(newest.name) if newest else 0
    if isinstance(wants, int) and wants < done:
        raise ValueError(f"total_steps={wants} is below {done}, the steps that {run_dir} has done; use {done} or more")


def _set(sections: dict[str, Any], path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        sections = sections.setdefault(parent, {})
    sections[name] = value
