"""Everything that crosses a process boundary: the messages, and how they become ZeroMQ frames and back.

A message is one multipart ZeroMQ message: a msgpack header `[SCHEMA, run_id, kind, request_number, fields]`, then the
raw frames its kind carries: two per group (`buffer/transport/packed_group.py`), one per `Frame` field. Nothing is ever
pickled. Sizes, schema, types and lengths are checked before anything is built from them; whatever is wrong raises
`WireError` and nothing else.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from buffer.transport.packed_group import PackedGroup, read_group_header
from buffer.transport.schema import (
    MAX_INTEGER,
    Count,
    Frame,
    Frames,
    Line,
    Name,
    Number,
    PathName,
    Reader,
    Seconds,
    SmallCount,
    Version,
    VersionDistance,
    VersionOrNone,
    WireError,
    field_types,
    record,
    unpack_header,
)

SCHEMA = 5
MAX_FRAME_BYTES = 1 << 28
MAX_FRAMES = 1 << 16
MAX_MESSAGE_BYTES = 1 << 30


class ForeignRunError(WireError):
    """A sound header of another run."""


# --- actor -> buffer, and the replies -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to sample one group for one prompt until the deadline."""

    group_id: Name
    prompt_id: Count
    deadline_seconds: Seconds
    """Seconds from now after which a silent actor loses the lease."""
    samples_per_group: SmallCount = 0
    max_new_tokens: Count = 0
    """What the curriculum's stage asks for; 0: what the actor's own configuration says."""


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """Credit for `num_groups` groups. Waits for: admission. Unblocked by: batches taken, newer weights on the actor."""

    actor_id: Name
    policy_version: VersionOrNone
    num_groups: SmallCount
    data_fingerprint: Name


@dataclass(frozen=True, slots=True)
class LeaseReply:
    """Granted leases; `evaluate_version` >= 0 asks this actor to evaluate those weights (-1: nothing to evaluate)."""

    leases: tuple[Lease, ...]
    evaluate_version: VersionOrNone
    closing: bool
    """True when the run wants no more groups."""


@dataclass(frozen=True, slots=True)
class GroupDelivery:
    """One scored group. Resent until the receipt arrives."""

    actor_id: Name
    group: PackedGroup


@dataclass(frozen=True, slots=True)
class GroupReceipt:
    """What became of a delivered group.

    `outcome`: stored, dropped (too stale, or without signal), duplicate (known already), late (the lease was issued
    again) or unknown (never issued).
    """

    group_id: Name
    outcome: Name


@dataclass(frozen=True, slots=True)
class LeaseReturn:
    """Leases given back unsampled. An empty `reason` makes them pending again; any other drops them under it."""

    actor_id: Name
    group_ids: tuple[Name, ...]
    reason: Line


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """`role` `name` is alive. `metrics` feed the display and TensorBoard; `waiting_for` names what it waits for."""

    role: Name
    name: Name
    policy_version: VersionOrNone
    waiting_for: Line
    metrics: dict[Line, float]


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """The learner's newest version as the buffer knows it."""

    policy_version: VersionOrNone
    closing: bool


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Held-out accuracy of `policy_version`, measured because `requested_version` was asked for."""

    actor_id: Name
    requested_version: Version
    policy_version: Version
    num_prompts: Count
    pass_at_1: Number
    reward_mean: Number
    completion_tokens_mean: Number
    seconds: Seconds


@dataclass(frozen=True, slots=True)
class Done:
    """The request was carried out."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The request was understood and will never be granted; `reason` is one sentence for a person."""

    reason: Line


# --- learner -> buffer, and the replies -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LearnerHello:
    """The learner starts at `policy_version`: what was used from there on will be handed out again."""

    policy_version: Version


@dataclass(frozen=True, slots=True)
class LearnerWelcome:
    """How many uses of groups were undone, and how many groups are leased or ready in all."""

    num_rolled_back: Count
    num_outstanding: Count


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """Rank `rank` of `world_size` wants its shard of the batch for `policy_version`. Waits for: ready groups.

    Shards cost about the same: a trajectory of T tokens T (1 + T / `attention_crossover_tokens`), or T where that is 0.
    """

    policy_version: Version
    rank: SmallCount
    world_size: SmallCount
    attention_crossover_tokens: Number = 0.0


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's share of a batch: whole groups in issue order, with each group's staleness in versions."""

    policy_version: Version
    num_groups_in_batch: SmallCount
    staleness: tuple[VersionDistance, ...]
    groups: tuple[PackedGroup, ...]


@dataclass(frozen=True, slots=True)
class NoMoreBatches:
    """There is no batch to wait for, and the run must not go on; `reason` is one sentence for a person."""

    reason: Line


@dataclass(frozen=True, slots=True)
class CheckpointCommitted:
    """The checkpoint of `policy_version` is durable: groups used before it, and not to be used again, are done."""

    policy_version: Version


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """Evaluate the weights of `policy_version` (or the newest the actor has) on the held-out prompts."""

    policy_version: Version


@dataclass(frozen=True, slots=True)
class EvaluationQuery:
    """Reports with `requested_version` >= `since_version`."""

    since_version: VersionOrNone


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

    role: Name
    name: Name
    policy_version: VersionOrNone
    waiting_for: Line
    silent_seconds: Seconds
    metrics: dict[Line, float]
    waiting_seconds: Seconds = 0.0
    """How long `waiting_for` has been the same; 0 when it is empty."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Who waits for what, since when: one line of the answer to "why does nothing happen?"."""

    who: Line
    """A connection's name, the buffer, or a peer's."""
    for_what: Line
    """Reads on after "waits for"."""
    seconds: Seconds


@dataclass(frozen=True, slots=True)
class StageStatus:
    """Where the curriculum is. Stages count from 1; a run without a curriculum has one."""

    stage: SmallCount = 1
    num_stages: SmallCount = 1
    success: Number = 0.0
    """Share of correct completions in the stage's last groups that went to the learner or were dropped as no_signal,
    `num_groups` of them."""
    num_groups: Count = 0
    num_passed_over: Count = 0
    """Prompts that the difficulty filter leaves out of the epoch under way."""


@dataclass(frozen=True, slots=True)
class Status:
    """Counts of the ledger by state (`dropped` by reason as `dropped:reason`), and every peer."""

    counts: dict[Line, Count]
    policy_version: VersionOrNone
    closing: bool
    peers: tuple[Peer, ...]
    reports: tuple[EvaluationReport, ...]
    waits: tuple[Wait, ...] = ()
    """The longest wait first; what the buffer knows itself and what peers say in their heartbeats."""
    stage: StageStatus = StageStatus()


# --- actor -> weight store of the learner ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ManifestRequest:
    """Ask for the newest manifest unless it is `known_publication`. Waits for: the next one, `wait_seconds` at most."""

    known_publication: Name
    wait_seconds: Seconds
    host_id: Name = ""
    """Of an actor that would take the version from a relay on its host."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies in a version's file."""

    name: Line
    dtype: Name
    shape: tuple[Count, ...]
    offset: Count
    num_bytes: Count
    checksum: Name
    """XXH3 of the tensor's bytes, 16 hexadecimal digits."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One published version. `path` may be mapped by processes whose `host_id` is equal; others pull chunks."""

    policy_version: Version
    publication: Name
    """Unique over restarts of the learner, which may publish the same version number with other weights."""
    path: PathName
    host_id: Name
    num_bytes: Count
    tensors: tuple[TensorEntry, ...]
    relay: Line = ""
    """Address of a relay on the asker's host, which has the version or is getting it."""


@dataclass(frozen=True, slots=True)
class NoNewVersion:
    """Nothing newer was published in time."""


@dataclass(frozen=True, slots=True)
class RelayHello:
    """A relay on `host_id` serves at `address`; said again every few seconds, as a sign of life."""

    address: Line
    host_id: Name


@dataclass(frozen=True, slots=True)
class RelayPlace:
    """Where in the tree the relay is: the address of the relay it pulls from; empty: the store itself."""

    parent: Line


@dataclass(frozen=True, slots=True)
class DeltaRequest:
    """Ask what turns `base`, which the actor has, into `publication`. Waits for: the comparison of the two."""

    publication: Name
    base: Name


@dataclass(frozen=True, slots=True)
class DeltaReply:
    """The size of that delta, to be pulled in chunks; 0: pull the whole version, it is cheaper or the base is gone."""

    num_bytes: Count
    checksum: Name
    """XXH3 of the delta."""


@dataclass(frozen=True, slots=True)
class ChunkRequest:
    """`num_bytes` bytes at `offset` of a publication's file, or of its delta against `base` where that is given."""

    publication: Name
    base: Name
    offset: Count
    num_bytes: Count


@dataclass(frozen=True, slots=True)
class Chunk:
    """The bytes asked for."""

    offset: Count
    checksum: Name
    """XXH3 of the bytes."""
    data: Frame


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
    | NoMoreBatches
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
    | RelayHello
    | RelayPlace
    | DeltaRequest
    | DeltaReply
    | ChunkRequest
    | Chunk
)
"""Every message there is; `kind` on the wire is the class name."""


# --- encoding --------------------------------------------------------------------------------------------------------


def encode(message: Message, request_number: int, run_id: str) -> Frames:
    """The frames of `message`: a header, then two per packed group and one per `Frame` field, in field order."""
    frames: Frames = [b""]
    fields = [_pack(getattr(message, name), frames) for name in _field_names(type(message))]
    frames[0] = msgpack.packb([SCHEMA, run_id, type(message).__name__, request_number, fields], use_bin_type=True)
    return frames


def decode(frames: Sequence[Frame], run_id: str) -> tuple[Message, int]:
    """The message of run `run_id` and its request number.

    Raises:
        ForeignRunError: it belongs to another run.
        WireError: whatever is wrong with the frames.
    """
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise WireError(f"{len(frames)} frames, expected 1 to {MAX_FRAMES}")
    if any(len(frame) > MAX_FRAME_BYTES for frame in frames):
        raise WireError(f"a frame is larger than {MAX_FRAME_BYTES} bytes")
    header = unpack_header(bytes(frames[0]))
    if not isinstance(header, list) or len(header) != 5:
        raise WireError("the header is not [schema, run id, kind, request number, fields]")
    schema, sent_run_id, kind, request_number, fields = header
    if type(schema) is not int or type(sent_run_id) is not str or type(kind) is not str:
        raise WireError("the schema is no number, or the run id or the kind is no text")
    if schema != SCHEMA:
        raise WireError(f"schema {schema}, this process speaks schema {SCHEMA}: run one version everywhere")
    if sent_run_id != run_id:
        raise ForeignRunError(f"it belongs to run {sent_run_id[:64]!r}, not to {run_id}")
    cls = _KINDS.get(kind)
    if cls is None:
        raise WireError(f"unknown kind of message {kind[:64]!r}")
    if type(request_number) is not int or not 0 <= request_number <= MAX_INTEGER:
        raise WireError("the request number is not a whole number >= 0")
    rest = list(reversed(frames[1:]))
    message = _READERS[cls](fields, rest)
    if rest:
        raise WireError(f"{kind} carries {len(rest)} frames too many")
    return message, request_number


def _pack(value: Any, frames: Frames) -> Any:
    if isinstance(value, PackedGroup):
        frames += [value.header_frame, value.arrays_frame]
        return None
    if isinstance(value, Frame):
        frames.append(value)
        return None
    if isinstance(value, tuple):
        return [_pack(item, frames) for item in value]
    if dataclasses.is_dataclass(value):
        return [_pack(getattr(value, name), frames) for name in _field_names(type(value))]
    return value


def _take_group(value: Any, rest: Frames) -> PackedGroup:
    if value is not None or len(rest) < 2:
        raise WireError("a group's frames are missing")
    return read_group_header(bytes(rest.pop()), bytes(rest.pop()))


def _take_frame(value: Any, rest: Frames) -> Frame:
    if value is not None or not rest:
        raise WireError("a frame of bytes is missing")
    return rest.pop()


_SPECIAL: dict[Any, Reader] = {PackedGroup: _take_group, Frame: _take_frame}
_KINDS: dict[str, Any] = {cls.__name__: cls for cls in typing.get_args(Message)}
_READERS: dict[type[Any], Reader] = {cls: record(cls, _SPECIAL) for cls in _KINDS.values()}
_FIELDS: dict[type[Any], tuple[str, ...]] = {}


def _field_names(cls: type[Any]) -> tuple[str, ...]:
    """Looked up once per class."""
    if cls not in _FIELDS:
        _FIELDS[cls] = tuple(field_types(cls))
    return _FIELDS[cls]
