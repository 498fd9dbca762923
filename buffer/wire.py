"""Everything that crosses a process boundary: the messages, and how they become ZeroMQ frames and back.

A message is one multipart ZeroMQ message: a msgpack header `[SCHEMA, kind, request_number, fields]`, then the raw
frames its kind carries. A trajectory group travels as two frames, a msgpack header and one frame of arrays
(`token_ids` int32, then `behavior_logprobs` float32, then `loss_mask` uint8, each concatenated over the group), so the
buffer can store and forward a group without touching its arrays. Nothing is ever pickled. Sizes, schema, types and
lengths are checked before anything is built from them; whatever is wrong raises `WireError` and nothing else.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from buffer.trajectory import FinishReason, Trajectory, TrajectoryGroup, VersionSpan

SCHEMA = 1
MAX_HEADER_BYTES = 1 << 22
MAX_FRAME_BYTES = 1 << 28
MAX_FRAMES = 1 << 16
BYTES_PER_TOKEN = 4 + 4 + 1
MAX_INTEGER = (1 << 63) - 1
"""What the ledger's database can hold; msgpack alone would let unsigned numbers above it through."""

Frames = list[bytes]


class WireError(ValueError):
    """A message that is not one of ours: wrong schema, kind, type, length or size."""


@dataclass(frozen=True, slots=True)
class GroupHeader:
    """What the ledger needs to know of a group without decoding its arrays."""

    group_id: str
    prompt_id: int
    oldest_version: int
    num_tokens: tuple[int, ...]
    """Length of each trajectory in tokens."""
    rewards: tuple[float, ...]
    details: tuple[tuple[str, dict[str, float], str, str, int, str, float, tuple[tuple[int, int], ...]], ...]
    """Per trajectory: trajectory_id, reward_breakdown, verdict, finish_reason, num_turns, actor_id, created_at and the
    (start, version) runs."""


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


# --- actor -> buffer, and the replies -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to sample one group for one prompt until the deadline."""

    group_id: str
    prompt_id: int
    deadline_seconds: float
    """Seconds from now after which a silent actor loses the lease."""


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """Credit for `num_groups` groups. Waits for: admission. Unblocked by: batches taken, newer weights on the actor."""

    actor_id: str
    policy_version: int
    num_groups: int
    data_fingerprint: str


@dataclass(frozen=True, slots=True)
class LeaseReply:
    """Granted leases; `evaluate_version` >= 0 asks this actor to evaluate those weights (-1: nothing to evaluate)."""

    leases: tuple[Lease, ...]
    evaluate_version: int
    closing: bool
    """True when the run wants no more groups."""


@dataclass(frozen=True, slots=True)
class GroupDelivery:
    """One scored group. Resent until the receipt arrives."""

    actor_id: str
    group: PackedGroup


@dataclass(frozen=True, slots=True)
class GroupReceipt:
    """`outcome`: stored, duplicate (known already), late (the lease was issued again) or unknown (never issued)."""

    group_id: str
    outcome: str


@dataclass(frozen=True, slots=True)
class LeaseReturn:
    """Leases given back unsampled. An empty `reason` makes them pending again; any other drops them under it."""

    actor_id: str
    group_ids: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """`role` `name` is alive. `metrics` feed the display and TensorBoard; `waiting_for` names what it waits for."""

    role: str
    name: str
    policy_version: int
    waiting_for: str
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """The learner's newest version as the buffer knows it."""

    policy_version: int
    closing: bool


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Held-out accuracy of `policy_version`, measured because `requested_version` was asked for."""

    actor_id: str
    requested_version: int
    policy_version: int
    num_prompts: int
    pass_at_1: float
    reward_mean: float
    completion_tokens_mean: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Done:
    """The request was carried out."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The request was understood and will never be granted; `reason` is one sentence for a person."""

    reason: str


# --- learner -> buffer, and the replies -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LearnerHello:
    """The learner starts at `policy_version`: groups used after it become ready again."""

    policy_version: int


@dataclass(frozen=True, slots=True)
class LearnerWelcome:
    """How many groups were rolled back to ready, and how many are leased or ready in all."""

    num_rolled_back: int
    num_outstanding: int


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """Rank `rank` of `world_size` wants its shard of the batch for `policy_version`. Waits for: ready groups."""

    policy_version: int
    rank: int
    world_size: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's share of a batch: whole groups in issue order, with each group's staleness in versions."""

    policy_version: int
    num_groups_in_batch: int
    staleness: tuple[int, ...]
    groups: tuple[PackedGroup, ...]


@dataclass(frozen=True, slots=True)
class CheckpointCommitted:
    """The checkpoint of `policy_version` is durable: groups used before it are done."""

    policy_version: int


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """Evaluate the weights of `policy_version` (or the newest the actor has) on the held-out prompts."""

    policy_version: int


@dataclass(frozen=True, slots=True)
class EvaluationQuery:
    """Reports with `requested_version` >= `since_version`."""

    since_version: int


@dataclass(frozen=True, slots=True)
class EvaluationReports:
    """The reports asked for, oldest first."""

    reports: tuple[EvaluationReport, ...]


@dataclass(frozen=True, slots=True)
class Close:
    """The learner wants no more groups; leases stop, evaluation goes on."""


# --- anyone -> buffer ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StatusRequest:
    """Ask for the display's numbers."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One process as last heard of."""

    role: str
    name: str
    policy_version: int
    waiting_for: str
    silent_seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Status:
    """Counts of the ledger by state (`dropped` by reason as `dropped:reason`), and every peer."""

    counts: dict[str, int]
    policy_version: int
    closing: bool
    peers: tuple[Peer, ...]
    reports: tuple[EvaluationReport, ...]


# --- actor -> weight store of the learner ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ManifestRequest:
    """Ask for the newest manifest unless it is `known_publication`. Waits for: the next one, `wait_seconds` at most."""

    known_publication: str
    wait_seconds: float


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies in a version's file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    checksum: int
    """CRC-32 of the tensor's bytes."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One published version. `path` may be mapped by processes whose `host_id` is equal; others pull chunks."""

    policy_version: int
    publication: str
    """Unique over restarts of the learner, which may publish the same version number with other weights."""
    path: str
    host_id: str
    num_bytes: int
    tensors: tuple[TensorEntry, ...]


@dataclass(frozen=True, slots=True)
class NoNewVersion:
    """Nothing newer was published in time."""


@dataclass(frozen=True, slots=True)
class ChunkRequest:
    """`num_bytes` bytes at `offset` of a version's file."""

    policy_version: int
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """The bytes asked for."""

    policy_version: int
    offset: int
    data: bytes


Message = (
    LeaseRequest
    | LeaseReply
    | GroupDelivery
    | GroupReceipt
    | LeaseReturn
    | Heartbeat
    | HeartbeatReply
    | EvaluationReport
    | Done
    | Refused
    | LearnerHello
    | LearnerWelcome
    | BatchRequest
    | Shard
    | CheckpointCommitted
    | EvaluationRequest
    | EvaluationQuery
    | EvaluationReports
    | Close
    | StatusRequest
    | Status
    | ManifestRequest
    | Manifest
    | NoNewVersion
    | ChunkRequest
    | Chunk
)
"""Every message there is; `kind` on the wire is the class name."""


# --- encoding --------------------------------------------------------------------------------------------------------


def encode(message: Message, request_number: int) -> Frames:
    """The frames of `message`: a header, then two per packed group and one per bytes field, in field order."""
    frames: Frames = [b""]
    fields = [_pack(getattr(message, name), frames) for name in _field_types(type(message))]
    frames[0] = msgpack.packb([SCHEMA, type(message).__name__, request_number, fields], use_bin_type=True)
    return frames


def decode(frames: Sequence[bytes]) -> tuple[Message, int]:
    """The message and its request number.

    Raises:
        WireError: whatever is wrong with the frames.
    """
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise WireError(f"{len(frames)} frames, expected 1 to {MAX_FRAMES}")
    if any(len(frame) > MAX_FRAME_BYTES for frame in frames):
        raise WireError(f"a frame is larger than {MAX_FRAME_BYTES} bytes")
    header = _unpack_header(frames[0])
    if not isinstance(header, list) or len(header) != 4:
        raise WireError("the header is not [schema, kind, request number, fields]")
    schema, kind, request_number, fields = header
    if schema != SCHEMA:
        raise WireError(f"schema {schema!r}, this process speaks schema {SCHEMA}: run one version everywhere")
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise WireError(f"unknown kind of message {kind!r}"[:200])
    if type(request_number) is not int or not 0 <= request_number <= MAX_INTEGER:
        raise WireError("the request number is not a whole number >= 0")
    types_by_name = _field_types(cls)
    if not isinstance(fields, list) or len(fields) != len(types_by_name):
        raise WireError(f"{kind} has {len(types_by_name)} fields")
    rest = list(reversed(frames[1:]))
    values = [_unpack(value, wanted, rest) for value, wanted in zip(fields, types_by_name.values(), strict=True)]
    if rest:
        raise WireError(f"{kind} carries {len(rest)} frames too many")
    return cls(*values), request_number


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
    fields = [getattr(header, name) for name in _field_types(GroupHeader)]
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
    header: GroupHeader = _build(GroupHeader, _unpack_header(header_frame), [])
    counts = (len(header.num_tokens), len(header.rewards), len(header.details))
    if not header.num_tokens or len(set(counts)) != 1:
        raise WireError(f"group {header.group_id}: lengths {counts} of a group's header disagree")
    if min(header.num_tokens) < 1 or sum(header.num_tokens) * BYTES_PER_TOKEN != len(arrays_frame):
        raise WireError(f"group {header.group_id}: {len(arrays_frame)} bytes of arrays for {header.num_tokens} tokens")
    if header.oldest_version < 0 or not all(math.isfinite(reward) for reward in header.rewards):
        raise WireError(f"group {header.group_id}: a version below 0 or a reward that is not finite")
    spans_by_trajectory = [detail[-1] for detail in header.details]
    if not all(spans_by_trajectory) or min(s[0][1] for s in spans_by_trajectory) != header.oldest_version:
        raise WireError(f"group {header.group_id}: oldest_version {header.oldest_version} is not that of its tokens")
    return PackedGroup(header, bytes(header_frame), bytes(arrays_frame))


def unpack_group(packed: PackedGroup) -> TrajectoryGroup:
    """The group with its arrays; views of the received bytes, not copies.

    Raises:
        WireError: when the contents break a rule of `Trajectory`.
    """
    header, total = packed.header, sum(packed.header.num_tokens)
    token_ids = np.frombuffer(packed.arrays_frame, np.int32, total)
    behavior_logprobs = np.frombuffer(packed.arrays_frame, np.float32, total, offset=4 * total)
    loss_mask = np.frombuffer(packed.arrays_frame, np.uint8, total, offset=8 * total)
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


def _pack(value: Any, frames: Frames) -> Any:
    if isinstance(value, PackedGroup):
        frames += [value.header_frame, value.arrays_frame]
        return None
    if isinstance(value, bytes):
        frames.append(value)
        return None
    if isinstance(value, tuple):
        return [_pack(item, frames) for item in value]
    if dataclasses.is_dataclass(value):
        return [_pack(getattr(value, name), frames) for name in _field_types(type(value))]
    return value


def _unpack_header(frame: bytes) -> Any:
    if len(frame) > MAX_HEADER_BYTES:
        raise WireError(f"a header of {len(frame)} bytes; at most {MAX_HEADER_BYTES} are allowed")
    try:
        return msgpack.unpackb(frame, raw=False, strict_map_key=True)
    # msgpack raises ValueError subclasses, UnicodeDecodeError and, on deep nesting, RecursionError or StackError.
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise WireError(f"the header is not msgpack: {error}"[:200]) from error


def _unpack(value: Any, wanted: Any, rest: list[bytes]) -> Any:
    """`value` checked against the annotation `wanted`; packed groups and bytes are taken from the frames in `rest`."""
    if wanted is PackedGroup:
        if len(rest) < 2:
            raise WireError("a group's frames are missing")
        return read_group_header(rest.pop(), rest.pop())
    if wanted is bytes:
        if not rest:
            raise WireError("a frame of bytes is missing")
        return bytes(rest.pop())
    if wanted is float and type(value) in (int, float):
        return float(value)
    if wanted in (int, str, bool):
        if type(value) is not wanted:
            raise WireError(f"expected {wanted.__name__}, got {type(value).__name__}")
        if wanted is int and value > MAX_INTEGER:
            raise WireError(f"the number {value} is above {MAX_INTEGER}")
        return value
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is tuple and isinstance(value, list):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise WireError(f"expected {len(kinds)} values, got {len(value)}")
        return tuple(_unpack(item, kind, rest) for item, kind in zip(value, kinds, strict=True))
    if origin is dict and isinstance(value, dict):
        return {_unpack(k, arguments[0], rest): _unpack(v, arguments[1], rest) for k, v in value.items()}
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        return _build(wanted, value, rest)
    raise WireError(f"expected {wanted}, got {type(value).__name__}")


def _build(cls: type[Any], value: Any, rest: list[bytes]) -> Any:
    types_by_name = _field_types(cls)
    if not isinstance(value, list) or len(value) != len(types_by_name):
        raise WireError(f"{cls.__name__} has {len(types_by_name)} fields")
    return cls(*(_unpack(item, kind, rest) for item, kind in zip(value, types_by_name.values(), strict=True)))


_TYPES: dict[type[Any], dict[str, Any]] = {}


def _field_types(cls: type[Any]) -> dict[str, Any]:
    """Field names and resolved annotations, looked up once per class."""
    if cls not in _TYPES:
        _TYPES[cls] = typing.get_type_hints(cls)
    return _TYPES[cls]


_KINDS: dict[str, Any] = {cls.__name__: cls for cls in typing.get_args(Message)}
