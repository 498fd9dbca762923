"""A slow reference implementation of the choice of a batch, for the buffer's tests."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from buffer.config import BufferConfig


@dataclass(frozen=True)
class Group:
    """A ready group, or one that was used and may be used again."""

    occurrence: int
    version: int
    was_used: bool
    spread: float


def expected_batch(config: BufferConfig, candidates: Sequence[Group], leased: Sequence[int], version: int) -> list[int]:
    """The occurrences of the batch, ascending. Valid only if the buffer cut a batch and did not wait."""
    size, following = config.groups_per_batch, version + config.updates_per_batch
    in_order = sorted(candidates, key=lambda g: (g.version, g.occurrence))
    new = [g for g in in_order if not g.was_used][:size]
    if config.on_stale != "wait":
        leased = [v for v in leased if v + config.max_staleness >= following]
    due: list[Group] = []
    wished = ordered(config, in_order, version)
    rest = [g.version for g in in_order if not g.was_used and g not in wished[:size]] + list(leased)
    if all_in_time(config, rest, following):
        return sorted(g.occurrence for g in wished[:size])
    for group in new:
        rest = [g.version for g in in_order if not g.was_used and g not in due] + list(leased)
        if all_in_time(config, rest, following):
            break
        due.append(group)
    others = [g for g in wished if g not in due]
    return sorted(g.occurrence for g in [*due, *others][:size])


def all_in_time(config: BufferConfig, versions: Sequence[int], following: int) -> bool:
    """Whether all are used in time if each batch from `following` on takes the oldest groups."""
    last = following + config.max_staleness // config.updates_per_batch * config.updates_per_batch
    for place, version in enumerate(sorted(versions)):
        batch = following + place // config.groups_per_batch * config.updates_per_batch
        if batch > min(version + config.max_staleness, last):
            return False
    return True


def ordered(config: BufferConfig, groups: list[Group], version: int) -> list[Group]:
    """The groups in the sampler's order, by one draw after another."""
    chance = np.random.default_rng((config.seed, version))
    match config.sampler:
        case "uniform":
            return [groups[i] for i in chance.permutation(len(groups))]
        case "freshest":
            return sorted(groups, key=lambda g: (-g.version, g.version, g.occurrence))
        case "prioritized":
            draws = {g: 1 - chance.random() for g in groups}
            return sorted(groups, key=lambda g: -(draws[g] ** (1 / g.spread)) if g.spread else 1)
        case _:
            return groups
