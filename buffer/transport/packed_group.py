"""A trajectory group as it travels and is stored: two frames, a msgpack header and one frame of arrays.

The arrays are `token_ids` int32, then `behavior_logprobs` float32, then `loss_mask` uint8, each concatenated over the
group, so that the buffer can store and forward a group without touching them. Types, lengths and rules are checked
before anything is built from received bytes; whatever is wrong raises `WireError` and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import msgpack
import numpy as np
from numpy.typing import NDArray

from buffer.trajectory import FinishReason, Trajectory, TrajectoryGroup, VersionSpan
from buffer.transport.schema import Count, Line, Name, Number, Version, WireError, field_types, record, unpack_header

BYTES_PER_TOKEN = 4 + 4 + 1
LOWEST_FLOAT32 = float(np.finfo(np.float32).min)

TrajectoryDetails = tuple[Name, dict[Line, Number], Line, Name, Count, Name, Number, tuple[tuple[Count, Version], ...]]
"""trajectory_id, reward_breakdown, verdict, finish_reason, num_turns, actor_id, created_at, (start, version) runs."""


@dataclass(frozen=True, slots=True)
class GroupHeader:
    """What the ledger needs to know of a group without decoding its arrays."""

    group_id: Name
    prompt_id: Count
    oldest_version: Version
    num_tokens: tuple[Count, ...]
    """Length of each trajectory in tokens."""
    rewards: tuple[Number, ...]
    details: tuple[TrajectoryDetails, ...]
    """One per trajectory."""

    @property
    def num_correct(self) -> int:
        """Trajectories whose verdict is correct."""
        return sum(details[2] == "correct" for details in self.details)


@dataclass(frozen=True, slots=True)
class PackedGroup:
    """A group as it travels and as it is stored: the checked header, its bytes, and the arrays' bytes."""

    header: GroupHeader
    header_frame: bytes
    arrays_frame: bytes

    @property
    def num_bytes(self) -> int:
        """Bytes on the wire."""
        return len(self.header_frame) + len(self.arrays_frame)


def pack_group(group: TrajectoryGroup) -> PackedGroup:
    """A group as two frames."""
    trajectories = group.trajectories
    header = GroupHeader(
        group_id=group.group_id,
        prompt_id=group.prompt_id,
        oldest_version=group.oldest_version,
        num_tokens=tuple(t.num_tokens for t in trajectories),
        rewards=group.rewards,
        details=tuple(
            (
                t.trajectory_id,
                t.reward_breakdown,
                t.verdict,
                t.finish_reason.value,
                t.num_turns,
                t.actor_id,
                t.created_at,
                tuple((span.start, span.version) for span in t.policy_versions),
            )
            for t in trajectories
        ),
    )
    fields = [getattr(header, name) for name in _FIELDS]
    arrays = b"".join(
        [t.token_ids.tobytes() for t in trajectories]
        + [t.behavior_logprobs.tobytes() for t in trajectories]
        + [t.loss_mask.tobytes() for t in trajectories]
    )
    return PackedGroup(header, msgpack.packb(fields, use_bin_type=True), arrays)


def read_group_header(header_frame: bytes, arrays_frame: bytes) -> PackedGroup:
    """A packed group whose header is decoded and checked against the size of the arrays.

    Raises:
        WireError: whatever is wrong with the header or the size.
    """
    header: GroupHeader = _READ_GROUP(unpack_header(header_frame), [])
    counts = (len(header.num_tokens), len(header.rewards), len(header.details))
    if not header.num_tokens or len(set(counts)) != 1:
        raise WireError(f"group {header.group_id}: lengths {counts} of a group's header disagree")
    if min(header.num_tokens) < 1 or sum(header.num_tokens) * BYTES_PER_TOKEN != len(arrays_frame):
        raise WireError(f"group {header.group_id}: {len(arrays_frame)} bytes of arrays for {header.num_tokens} tokens")
    if any(detail[3] not in _FINISH_REASONS for detail in header.details):
        raise WireError(f"group {header.group_id}: a finish reason is none of {', '.join(sorted(_FINISH_REASONS))}")
    spans_by_trajectory = [detail[-1] for detail in header.details]
    if not all(spans_by_trajectory) or min(s[0][1] for s in spans_by_trajectory) != header.oldest_version:
        raise WireError(f"group {header.group_id}: oldest_version {header.oldest_version} is not that of its tokens")
    return PackedGroup(header, bytes(header_frame), bytes(arrays_frame))


def unpack_group(packed: PackedGroup) -> TrajectoryGroup:
    """The group with its arrays; views of the received bytes, not copies.

    Raises:
        WireError: when the contents break a rule of `Trajectory`.
    """
    header, (token_ids, behavior_logprobs, loss_mask) = packed.header, _arrays(packed)
    if loss_mask.max() > 1:
        raise WireError(f"group {header.group_id}: the loss mask holds {loss_mask.max()}; only 0 and 1 are allowed")
    trajectories, start = [], 0
    try:
        for length, reward, detail in zip(header.num_tokens, header.rewards, header.details, strict=True):
            part = slice(start, start + length)
            start += length
            trajectory_id, breakdown, verdict, finish_reason, num_turns, actor_id, created_at, spans = detail
            trajectories.append(
                Trajectory(
                    trajectory_id=trajectory_id,
                    group_id=header.group_id,
                    prompt_id=header.prompt_id,
                    token_ids=token_ids[part],
                    loss_mask=loss_mask[part].view(np.bool_),
                    behavior_logprobs=behavior_logprobs[part],
                    policy_versions=tuple(VersionSpan(first, version) for first, version in spans),
                    reward=reward,
                    reward_breakdown=breakdown,
                    verdict=verdict,
                    finish_reason=FinishReason(finish_reason),
                    num_turns=num_turns,
                    actor_id=actor_id,
                    created_at=created_at,
                )
            )
        return TrajectoryGroup(header.group_id, header.prompt_id, tuple(trajectories))
    except WireError:
        raise
    except ValueError as error:
        raise WireError(str(error)) from error


def check_group(packed: PackedGroup) -> None:
    """Whether `unpack_group` will take it, found for all its trajectories at once and several times faster.

    Raises:
        WireError: when the contents break a rule of `Trajectory`.
    """
    header, (token_ids, logprobs, mask) = packed.header, _arrays(packed)
    starts = list(accumulate((0, *header.num_tokens[:-1])))
    rules = {
        "the loss mask holds numbers other than 0 and 1": mask.max() > 1,
        "a loss mask selects nothing": not np.maximum.reduceat(mask, starts).all(),
        "a first token is in the loss mask": mask[starts].any(),
        "a token id is negative": token_ids.min() < 0,
        # A NaN makes both comparisons false.
        "a log-probability is not finite or above 0": not (logprobs.max() <= 0 and logprobs.min() >= LOWEST_FLOAT32),
        "a log-probability is not 0 where the loss mask is": np.any(logprobs[mask == 0]),
        "its versions decrease or lie outside": not all(map(_are_spans, header.details, header.num_tokens)),
    }
    for broken, holds in rules.items():
        if holds:
            raise WireError(f"group {header.group_id}: {broken}")


def _arrays(packed: PackedGroup) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.uint8]]:
    """Views of token_ids, behavior_logprobs and loss_mask, all trajectories of the group one after another."""
    total = sum(packed.header.num_tokens)
    return (
        np.frombuffer(packed.arrays_frame, np.int32, total),
        np.frombuffer(packed.arrays_frame, np.float32, total, offset=4 * total),
        np.frombuffer(packed.arrays_frame, np.uint8, total, offset=8 * total),
    )


def _are_spans(details: TrajectoryDetails, num_tokens: int) -> bool:
    spans = details[-1]
    in_order = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(spans))
    return in_order and spans[-1][0] < num_tokens


_FINISH_REASONS = {reason.value for reason in FinishReason}
_READ_GROUP = record(GroupHeader, {})
_FIELDS = tuple(field_types(GroupHeader))
