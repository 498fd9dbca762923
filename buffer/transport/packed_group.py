"""The encoding of a trajectory group, both on the wire and in the ledger: a msgpack header and one frame of arrays.

The arrays are `token_ids` int32, then `behavior_logprobs` float32, then `loss_mask` uint8, each concatenated over the
group's trajectories. The buffer stores and forwards a group without decoding the arrays. Received bytes are checked
before anything is built from them; invalid ones raise `WireError` and no other exception.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, chain

import msgpack
import numpy as np
from numpy.typing import NDArray

from buffer.trajectory import (
    FinishReason,
    Trajectory,
    TrajectoryGroup,
    VersionSpan,
    check_tokens,
    check_versions,
)
from buffer.transport.schema import (
    Count,
    Line,
    Name,
    Number,
    Version,
    WireError,
    check_texts,
    fast_reader,
    field_types,
)

BYTES_PER_TOKEN = 4 + 4 + 1

TrajectoryDetails = tuple[Name, dict[Line, Number], Line, Name, Count, Name, Number, tuple[tuple[Count, Version], ...]]
"""trajectory_id, reward_breakdown, verdict, finish_reason, num_turns, actor_id, created_at, (start, version) spans."""


@dataclass(frozen=True, slots=True)
class GroupHeader:
    """Everything about a group but its arrays."""

    group_id: Name
    prompt_id: Count
    oldest_version: Version
    num_tokens: tuple[Count, ...]
    """Length of each trajectory in tokens, prompt included."""
    rewards: tuple[Number, ...]
    """One per trajectory."""
    details: tuple[TrajectoryDetails, ...]
    """One per trajectory."""

    @property
    def num_correct(self) -> int:
        """Number of trajectories whose verdict is correct."""
        return sum(details[2] == "correct" for details in self.details)


@dataclass(frozen=True, slots=True)
class PackedGroup:
    """An encoded group: the decoded and checked header, the header's bytes, and the arrays' bytes."""

    header: GroupHeader
    header_frame: bytes
    arrays_frame: bytes

    @property
    def num_bytes(self) -> int:
        """Size of both frames."""
        return len(self.header_frame) + len(self.arrays_frame)


def pack_group(group: TrajectoryGroup) -> PackedGroup:
    """Encode a group."""
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
                t.policy_versions,
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
    """Decode the header of a received group and check it against the size of the arrays.

    The contents of the arrays are not checked; `check_group` and `unpack_group` do that.

    Raises:
        WireError: when the header is invalid or does not fit the arrays.
    """
    header: GroupHeader = _READ_HEADER(bytes(header_frame))
    counts = (len(header.num_tokens), len(header.rewards), len(header.details))
    if not header.num_tokens or len(set(counts)) != 1:
        raise WireError(f"group {header.group_id[:60]!r}: lengths {counts} of a group's header disagree")
    ids, breakdowns, verdicts, finish_reasons, _, actor_ids, _, spans = zip(*header.details, strict=True)
    check_texts(Name, (header.group_id, *ids, *actor_ids))
    check_texts(Line, (*verdicts, *chain.from_iterable(breakdowns)))
    if min(header.num_tokens) < 1 or sum(header.num_tokens) * BYTES_PER_TOKEN != len(arrays_frame):
        raise WireError(f"group {header.group_id}: {len(arrays_frame)} bytes of arrays for {header.num_tokens} tokens")
    if not _FINISH_REASONS.issuperset(finish_reasons):
        raise WireError(f"group {header.group_id}: a finish reason is none of {', '.join(sorted(_FINISH_REASONS))}")
    if not all(spans) or min([first[1] for first, *_ in spans]) != header.oldest_version:
        raise WireError(f"group {header.group_id}: oldest_version {header.oldest_version} is not that of its tokens")
    return PackedGroup(header, bytes(header_frame), bytes(arrays_frame))


def unpack_group(packed: PackedGroup) -> TrajectoryGroup:
    """Decode a group. The arrays are read-only views of the received bytes, not copies.

    Raises:
        WireError: when the contents break a rule of `Trajectory`.
    """
    header, (token_ids, loss_mask, behavior_logprobs) = packed.header, _arrays(packed)
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
                    loss_mask=loss_mask[part],
                    behavior_logprobs=behavior_logprobs[part],
                    policy_versions=tuple(map(VersionSpan._make, spans)),
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
    except ValueError as error:
        raise WireError(str(error)) from error


def check_group(packed: PackedGroup) -> None:
    """Check the contents against the rules of `Trajectory`: as `unpack_group` does, but several times faster.

    Raises:
        WireError: when the contents break a rule.
    """
    header, where = packed.header, f"a trajectory of group {packed.header.group_id}"
    arrays, starts = _arrays(packed), (0, *accumulate(header.num_tokens[:-1]))
    try:
        check_tokens(*arrays, starts, where)
        for details, num_tokens in zip(header.details, header.num_tokens, strict=True):
            check_versions(details[-1], num_tokens, where)
    except ValueError as error:
        raise WireError(str(error)) from error


def check_bounds(
    packed: PackedGroup, *, vocab_size: int, max_tokens: int, samples_per_group: int, newest_version: int
) -> None:
    """Check a received group against the run's configuration (`BufferConfig`) and newest version. 0: no bound.

    Raises:
        WireError: when a token id, a length, the number of trajectories or a version is out of bounds; the message
            names the group, the value and the bound.
    """
    header = packed.header
    group = f"group {header.group_id} of prompt {header.prompt_id}"
    size, longest = len(header.num_tokens), max(header.num_tokens)
    if 0 < samples_per_group < size:
        raise WireError(f"{group} has {size} trajectories; the run has at most {samples_per_group} per group")
    if 0 < max_tokens < longest:
        raise WireError(f"{group} has a trajectory of {longest} tokens; the run has at most {max_tokens}")
    newest = max(details[-1][-1][1] for details in header.details)
    if newest > newest_version:
        raise WireError(f"{group} names policy {newest}; the newest that can exist is {newest_version}")
    if vocab_size:
        highest = int(_arrays(packed)[0].max())
        if highest >= vocab_size:
            raise WireError(f"{group} has token id {highest}; the model has {vocab_size} token ids")


def _arrays(packed: PackedGroup) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.float32]]:
    """Return views of token_ids, loss_mask and behavior_logprobs, concatenated over the group.

    Raises:
        WireError: when the loss mask holds another value than 0 and 1.
    """
    total = sum(packed.header.num_tokens)
    loss_mask = np.frombuffer(packed.arrays_frame, np.uint8, total, offset=8 * total)
    if loss_mask.max() > 1:
        group_id = packed.header.group_id
        raise WireError(f"group {group_id}: the loss mask holds {loss_mask.max()}; only 0 and 1 are allowed")
    return (
        np.frombuffer(packed.arrays_frame, np.int32, total),
        loss_mask.view(np.bool_),
        np.frombuffer(packed.arrays_frame, np.float32, total, offset=4 * total),
    )


_FINISH_REASONS = {reason.value for reason in FinishReason}
_READ_HEADER = fast_reader(GroupHeader)
_FIELDS = tuple(field_types(GroupHeader))
