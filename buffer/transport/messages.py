"""The messages between processes, and their encoding as ZeroMQ frames.

Each message is one multipart ZeroMQ message. Its first frame is a msgpack header
`[SCHEMA, run_id, kind, request_number, fields]`. Raw frames follow: two per group
(`buffer/transport/packed_group.py`) and one per field of type `Frame`. Nothing is ever pickled.

`decode` checks sizes, schema, types and lengths before it builds a value. An invalid message raises `WireError` and no
other exception. An answer carries the request number of its request. A client resends a request, with the same number,
until the answer arrives, so the server must answer every request idempotently.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import msgpack

from buffer.transport.packed_group import PackedGroup, read_group_header
from buffer.transport.schema import (
    MAX_INTEGER,
    Count,
    Frame,
    Frames,
    Line,
    Metrics,
    Name,
    Number,
    PathName,
    Reader,
    Role,
    Seconds,
    Share,
    SmallCount,
    TokenId,
    Version,
    VersionDistance,
    VersionOrNone,
    WireError,
    field_types,
    record,
    unpack_header,
)

SCHEMA = 7
MAX_FRAME_BYTES = 1 << 28
MAX_FRAMES = 1 << 16
MAX_MESSAGE_BYTES = 1 << 30
MOST_PROBED_TOKENS = 16
"""Most tokens that a probe scores. An actor's engine has room for as many requests beside those of the rollouts."""
MAX_TENSORS = 1 << 17
"""Largest number of tensors in a manifest: more than the experts of the largest models have, one by one."""
MAX_TENSORS_BYTES = 1 << 25
MAX_NAMED = 256
"""Processes that one status request may name."""


class ForeignRunError(WireError):
    """A well-formed message of another run."""


# Actor -> buffer, and the answers.


@dataclass(frozen=True, slots=True)
class Lease:
    """Permission for one actor to sample one group for one prompt.

    The lease ends when the group is delivered, when the actor returns the lease, when the actor no longer says that it
    has the lease (`LeaseRequest.held`), when another process takes the actor's name over, or when the buffer has heard
    nothing from the actor for `buffer.lease_seconds`. `HeartbeatReply.ended` tells the actor. A lease that has ended
    never comes back: the prompt's next lease has another group id.
    """

    group_id: Name
    prompt_id: Count
    samples_per_group: SmallCount = 0
    max_new_tokens: Count = 0
    """Limits of the curriculum's stage for this group; 0: use the actor's configuration."""


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """Ask for up to `num_groups` leases.

    Waits for: admission (`buffer/ledger/admission.py`), or an evaluation to run. Unblocked by: a batch handed out,
    newer weights on the actor, the end of another lease, the end of the run.
    """

    actor_id: Name
    policy_version: VersionOrNone
    num_groups: SmallCount
    data_fingerprint: Name
    held: tuple[Name, ...] = ()
    """Group ids that the actor works on, or whose receipt it has not got. All other leases that were granted to the
    connection's earlier requests end."""
    evaluating: tuple[Version, ...] = ()
    """Requested versions of the evaluations that the actor works on. Its other evaluations become pending."""


@dataclass(frozen=True, slots=True)
class LeaseReply:
    """The granted leases, and possibly an evaluation to run."""

    leases: tuple[Lease, ...]
    evaluate_version: VersionOrNone
    """Policy version that this actor shall evaluate on the held-out prompts; -1: none."""
    closing: bool
    """True when the run needs no more groups."""


@dataclass(frozen=True, slots=True)
class GroupDelivery:
    """Deliver one scored group. The answer is a `GroupReceipt`."""

    actor_id: Name
    group: PackedGroup


@dataclass(frozen=True, slots=True)
class GroupReceipt:
    """The outcome of a delivery, sent after the ledger's transaction has committed."""

    group_id: Name
    outcome: Name
    """stored; dropped: the group is too stale, or its rewards are all equal and such groups are dropped; duplicate:
    this group was delivered before; late: the lease has ended; unknown: no such lease was ever granted."""


@dataclass(frozen=True, slots=True)
class LeaseReturn:
    """Return leases whose groups will not be delivered.

    With an empty `reason` the prompts become pending again. With any other reason the prompts are dropped and counted
    under that reason.
    """

    actor_id: Name
    group_ids: tuple[Name, ...]
    reason: Line


@dataclass(frozen=True, slots=True)
class ActorGoodbye:
    """The actor's process ends: its leases and its evaluation become pending, and its parked request is forgotten."""

    actor_id: Name


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Tell the buffer that a process is alive. Each heartbeat of an actor also extends its leases."""

    role: Role
    """learner or actor."""
    name: Name
    policy_version: VersionOrNone
    """Version of the learner, or of the weights that the actor samples with; -1: none yet."""
    waiting_for: Line
    """What the process waits for, in words that complete "waits for"; empty: it does not wait."""
    metrics: Metrics
    """Values for the terminal display and TensorBoard, by name."""
    held: tuple[Name, ...] = ()
    """An actor's groups, as in `LeaseRequest`."""
    evaluating: tuple[Version, ...] = ()
    """An actor's evaluations, as in `LeaseRequest`."""
    epoch: Count = 0
    """Of a learner, as in its other messages; 0 before its hello, and of an actor."""
    activity: Line = ""
    """What a learner rank does, such as "trains on the batch for policy 41"; empty: nothing that takes long."""
    activity_seconds: Seconds = 0.0
    """How long it has been doing that."""
    num_pieces: Count = 0
    """Pieces of work that a learner rank has finished: activities, microbatches, waits."""
    limit_seconds: Seconds = 0.0
    """How long its present piece may take before the rank counts as hung; 0: as long as it likes, as in a wait."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A sequence that actors score, so that the learner can compare (`learner/monitoring/weight_probe.py`)."""

    probe_id: Count
    """Another one for every round, also after a restart of the learner."""
    policy_version: Version
    """Oldest version to score the sequence under; an actor with older weights waits for newer ones."""
    token_ids: tuple[TokenId, ...]
    num_scored: SmallCount
    """How many of the last tokens are scored: at most `MOST_PROBED_TOKENS`."""


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """The learner's newest version, as far as the buffer knows."""

    policy_version: VersionOrNone
    closing: bool
    ended: tuple[Name, ...] = ()
    """Group ids in the heartbeat's `held` that are not leased to its sender. Work on them is wasted."""
    probes: tuple[Probe, ...] = ()
    """At most one: the probe that this actor shall answer, repeated until its report has arrived."""
    learner_silent_seconds: Number = -1.0
    """Time since the buffer last heard from a learner rank; -1: never since the buffer started."""
    least_seconds: Seconds = 0.0
    """Time until the next heartbeat, at least. It grows with the number of actors (`buffer/service/peers.py`)."""


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """An actor's log-probabilities of a probe's scored tokens, at the sampling temperature."""

    actor_id: Name
    probe_id: Count
    policy_version: Version
    """The version that the actor's engine names."""
    logprobs: tuple[Number, ...]
    seconds: Seconds
    """How long the actor took."""


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Results on the held-out prompts.

    The actor evaluated `policy_version`, its newest weights, because an evaluation of `requested_version` was pending.
    """

    actor_id: Name
    requested_version: Version
    policy_version: Version
    num_prompts: Count
    pass_at_1: Share
    reward_mean: Number
    completion_tokens_mean: Number
    seconds: Seconds
    """Duration of the evaluation."""


@dataclass(frozen=True, slots=True)
class Done:
    """The request succeeded and has no other result."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The request is valid but will never be granted. `reason` is one sentence for the user."""

    reason: Line
    is_server_error: bool = False
    """Whether the server failed; otherwise the request is at fault, and its sender would be refused again."""
    is_replaced: bool = False
    """Whether a newer process works under the sender's name."""


# Learner -> buffer, and the answers.


@dataclass(frozen=True, slots=True)
class LearnerHello:
    """The learner starts, or resumes, at `policy_version`. The buffer undoes all batches of that version and later."""

    policy_version: Version
    failed_version: VersionOrNone = -1
    """Version of the batch on which the learner's last process failed with an error; -1: it did not."""
    failed_groups: tuple[Name, ...] = ()
    """Group ids that the failed rank trained on. Those that fail twice are set aside (`buffer/ledger/batches.py`)."""
    failure: Line = ""
    """The error, for the user."""
    failure_id: Name = ""
    """Another one for every failure."""
    after_epoch: VersionOrNone = -1
    """`epoch` of the status that this learner read before. If another learner has started since, the hello changes
    nothing: it may be the last message of a dead learner, which arrives after its successor's. -1: not checked."""


@dataclass(frozen=True, slots=True)
class LearnerWelcome:
    """The state of the ledger after `LearnerHello`."""

    num_rolled_back: Count
    """Places in undone batches; their groups will be handed out again."""
    num_outstanding: Count
    """Groups that are leased or ready."""
    epoch: Count = 0
    """Number of the learner, which grows with every hello. All later messages of the learner carry it, and the buffer
    refuses those of an earlier learner. 0: another learner has started since the status; ask for the status again."""


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """Ask for one rank's shard of the batch for `policy_version`.

    Waits for: enough ready groups, and leased groups that would otherwise become too stale. Unblocked by: deliveries,
    ends of leases.

    The buffer balances the shards by cost. A trajectory of T tokens costs T (1 + T / `attention_crossover_tokens`).
    """

    policy_version: Version
    rank: SmallCount
    world_size: SmallCount
    attention_crossover_tokens: Number = 0.0
    """Length at which attention costs as much as the linear layers; 0: a trajectory costs T."""
    epoch: Count = 0


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's share of a batch."""

    policy_version: Version
    num_groups_in_batch: SmallCount
    """Groups of the whole batch, over all ranks."""
    staleness: tuple[VersionDistance, ...]
    """Per group: `policy_version` minus the version of its oldest token; negative after a rollback of the learner."""
    groups: tuple[PackedGroup, ...]
    """The first groups of the shard, as many as fit into `buffer/service/service.py`'s `SHARD_BYTES`. Within each
    optimizer step's part they are in the order in which their prompts were drawn."""
    rest: tuple[tuple[Count, Count], ...] = ()
    """(occurrence, number of tokens) of the shard's other groups, in order. `GroupRequest` fetches each."""


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """Ask for one group of the batch for `policy_version`. The answer is a `ShardGroup`."""

    policy_version: Version
    occurrence: Count
    epoch: Count = 0


@dataclass(frozen=True, slots=True)
class ShardGroup:
    """One whole group of a batch."""

    group: PackedGroup


@dataclass(frozen=True, slots=True)
class NoMoreBatches:
    """No batch will come and the run must end. `reason` is one sentence for the user."""

    reason: Line


@dataclass(frozen=True, slots=True)
class CheckpointBegun:
    """The checkpoint of `policy_version` is written and about to get its name.

    The answer is sent when the ledger's record of all batches before that version would survive a power cut. A learner
    that names the checkpoint only then never resumes with groups in its weights that the ledger does not know as used.
    """

    policy_version: Version
    epoch: Count = 0


@dataclass(frozen=True, slots=True)
class CheckpointCommitted:
    """The checkpoint of `policy_version` is durable.

    Groups whose batches all precede that version, and that no later batch can use, are done: the buffer deletes their
    contents.
    """

    policy_version: Version
    epoch: Count = 0


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """Have an actor evaluate `policy_version` on the held-out prompts, or the newer weights that the actor has."""

    policy_version: Version
    epoch: Count = 0


@dataclass(frozen=True, slots=True)
class EvaluationQuery:
    """Ask for the reports with `requested_version` >= `since_version`."""

    since_version: VersionOrNone


@dataclass(frozen=True, slots=True)
class EvaluationReports:
    """The reports that the query asked for, oldest first."""

    reports: tuple[EvaluationReport, ...]
    is_running: bool = False
    """Whether an actor that is alive runs an evaluation now."""


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """Have actors answer `probe`, and ask for the reports so far. Repeated during the round; waits for nothing."""

    probe: Probe
    epoch: Count = 0


@dataclass(frozen=True, slots=True)
class ProbeReports:
    """The reports of the probe's round so far."""

    reports: tuple[ProbeReport, ...]
    num_unanswered: Count
    """Live actors that were asked and have not answered."""
    num_actors: Count
    """Live actors in all."""


@dataclass(frozen=True, slots=True)
class Close:
    """The learner needs no more groups. The buffer grants no more leases; pending evaluations still run."""

    epoch: Count = 0


# Any process -> buffer, and the answers.


@dataclass(frozen=True, slots=True)
class StatusRequest:
    """Ask for the values of the terminal display."""

    names: tuple[Name, ...] = ()
    """Processes whose last heartbeat the answer shall have whatever their state; at most `MAX_NAMED` are looked up."""


@dataclass(frozen=True, slots=True)
class Peer:
    """The last heartbeat of one process."""

    role: Name
    name: Name
    policy_version: VersionOrNone
    waiting_for: Line
    silent_seconds: Seconds
    metrics: Metrics
    waiting_seconds: Seconds = 0.0
    """How long `waiting_for` has been unchanged; 0 when it is empty."""
    activity: Line = ""
    """As in `Heartbeat`."""
    activity_seconds: Seconds = 0.0
    """As in `Heartbeat`, up to now."""
    num_pieces: Count = 0
    """As in `Heartbeat`."""
    limit_seconds: Seconds = 0.0
    """As in `Heartbeat`."""


@dataclass(frozen=True, slots=True)
class ActorTotals:
    """All actors of the run together. Actors that have been silent for a minute do not count."""

    num_actors: Count = 0
    num_silent: Count = 0
    """Of these, the number that has been silent for longer than a few seconds."""
    num_waiting: Count = 0
    oldest_version: VersionOrNone = -1
    """Oldest version of the weights on any actor; -1: no actor, or one without weights."""
    newest_version: VersionOrNone = -1
    """Newest version on any process."""
    metrics: dict[Line, float] = dataclasses.field(default_factory=dict)
    """Sums, or means of shares and seconds, over the actors that report the metric (`buffer/actor_metrics.py`)."""
    silent_after_seconds: Seconds = 5.0
    """Silence that counts as such: longer with thousands of actors, which send fewer heartbeats."""


@dataclass(frozen=True, slots=True)
class Wait:
    """One process that waits; all of them together explain why a run makes no progress."""

    who: Line
    """Name of the actor or learner rank, or "buffer"."""
    for_what: Line
    """Words that complete "waits for"."""
    seconds: Seconds


@dataclass(frozen=True, slots=True)
class StageStatus:
    """The curriculum's current stage. A run without a curriculum has one stage."""

    stage: SmallCount = 1
    """Counted from 1."""
    num_stages: SmallCount = 1
    success: Number = 0.0
    """Share of correct completions over the stage's last `num_groups` groups."""
    num_groups: Count = 0
    """Groups that `success` covers: those used by the learner or dropped because their rewards were all equal."""
    num_passed_over: Count = 0
    """Prompts that the difficulty filter leaves out of the current epoch."""


@dataclass(frozen=True, slots=True)
class Status:
    """The state of the run. Its size does not grow with the number of processes, or with the run."""

    counts: dict[Line, Count]
    """Prompt occurrences by state, with dropped ones as `dropped:REASON`; `issued`; and the ledger's counters."""
    policy_version: VersionOrNone
    closing: bool
    peers: tuple[Peer, ...]
    """The learner's ranks, the processes that the request names, and of all others the worst: silent, or waiting."""
    reports: tuple[EvaluationReport, ...]
    """Of the first evaluation and the latest ones, oldest first. `EvaluationQuery` asks for all."""
    waits: tuple[Wait, ...] = ()
    """The longest waits, longest first; from parked requests at the buffer, and from heartbeats of other processes."""
    stage: StageStatus = StageStatus()
    notes: tuple[Line, ...] = ()
    """Sentences for the user about what went wrong."""
    actors: ActorTotals = ActorTotals()
    """All actors together, also those that are not among `peers`."""
    epoch: Count = 0
    """Number of the current learner, as in `LearnerWelcome`."""


# Actor or relay -> weight server, and the answers.


@dataclass(frozen=True, slots=True)
class ManifestRequest:
    """Ask for the newest manifest.

    Waits for: a publication other than `known_publication`. Gives up after: `wait_seconds`, with `NoNewVersion`.
    """

    known_publication: Name
    wait_seconds: Seconds
    host_id: Name = ""
    """The actor's host, if the actor can use a relay there."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in a version's file."""

    name: Line
    dtype: Name
    shape: tuple[Count, ...]
    offset: Count
    """Bytes from the start of the file."""
    num_bytes: Count
    checksum: Name
    """XXH3 of the tensor's bytes, 16 hexadecimal digits."""


class TensorEntries(tuple[TensorEntry, ...]):
    """The tensors of one version. They are sent as one frame, which is packed once, however many readers ask."""

    @cached_property
    def frame(self) -> bytes:
        """The entries as msgpack."""
        frame: bytes = msgpack.packb([_pack(entry, []) for entry in self], use_bin_type=True)
        if len(frame) > MAX_TENSORS_BYTES:
            raise ValueError(
                f"{len(self)} tensors take {len(frame)} bytes of a manifest; {MAX_TENSORS_BYTES} are allowed"
            )
        return frame


@dataclass(frozen=True, slots=True)
class Manifest:
    """One published version of the weights."""

    policy_version: Version
    publication: Name
    """Unique over restarts of the learner: a restarted learner may publish other weights under the same version."""
    path: PathName
    """The version's file. Processes on the host `host_id` map this file; all others pull chunks."""
    host_id: Name
    num_bytes: Count
    """Size of the file."""
    tensors: tuple[TensorEntry, ...]
    relay: Line = ""
    """Address of a relay on the requester's host, which has this version or is pulling it; empty: no relay."""

    def __post_init__(self) -> None:
        if not isinstance(self.tensors, TensorEntries):
            object.__setattr__(self, "tensors", TensorEntries(self.tensors))


@dataclass(frozen=True, slots=True)
class NoNewVersion:
    """No other version was published within `wait_seconds`."""


@dataclass(frozen=True, slots=True)
class RelayHello:
    """A relay on `host_id` serves at `address`. The relay repeats this every few seconds as a heartbeat."""

    address: Line
    host_id: Name


@dataclass(frozen=True, slots=True)
class RelayPlace:
    """The relay's place in the tree."""

    parent: Line
    """Address of the relay to pull from; empty: pull from the learner."""


@dataclass(frozen=True, slots=True)
class DeltaRequest:
    """Ask for the delta from publication `base`, which the actor has, to `publication`. Waits for: its computation."""

    publication: Name
    base: Name


@dataclass(frozen=True, slots=True)
class DeltaReply:
    """The delta is ready to be pulled in chunks."""

    num_bytes: Count
    """Size of the delta. 0: pull the whole version, because the delta is not much smaller or the base is gone."""
    checksum: Name
    """XXH3 of the delta."""


@dataclass(frozen=True, slots=True)
class ChunkRequest:
    """Ask for `num_bytes` bytes from `offset` on."""

    publication: Name
    base: Name
    """Empty: bytes of the publication's file; otherwise of its delta from this publication."""
    offset: Count
    num_bytes: Count


@dataclass(frozen=True, slots=True)
class Chunk:
    """The requested bytes."""

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
    | ActorGoodbye
    | Heartbeat
    | HeartbeatReply
    | EvaluationReport
    | ProbeReport
    | Done
    | Refused
    | LearnerHello
    | LearnerWelcome
    | BatchRequest
    | Shard
    | GroupRequest
    | ShardGroup
    | NoMoreBatches
    | CheckpointBegun
    | CheckpointCommitted
    | EvaluationRequest
    | EvaluationQuery
    | EvaluationReports
    | ProbeRequest
    | ProbeReports
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
"""All messages. `kind` in the header is the class name."""


def with_epoch(message: Any, epoch: int) -> Any:
    """Return the message of the learner with this epoch; any other message as it is."""
    if getattr(message, "epoch", 1) or isinstance(message, LearnerWelcome):
        return message
    return message if isinstance(message, Heartbeat) and message.role != "learner" else replace(message, epoch=epoch)


def encode(message: Message, request_number: int, run_id: str) -> Frames:
    """Return the frames of `message`: a header, then two per packed group and one per `Frame` field, in field order."""
    frames: Frames = [b""]
    fields = [_pack(getattr(message, name), frames) for name in _field_names(type(message))]
    frames[0] = msgpack.packb([SCHEMA, run_id, type(message).__name__, request_number, fields], use_bin_type=True)
    return frames


def decode(frames: Sequence[Frame], run_id: str) -> tuple[Message, int]:
    """Decode the message of run `run_id`, and its request number.

    Raises:
        ForeignRunError: when the message belongs to another run.
        WireError: when the frames are not a valid message.
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
        raise WireError("the schema is not a number, or the run id or the kind is no text")
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
    cls = type(value)
    if cls in _SENT_AS_THEY_ARE:
        return value
    if cls is tuple:
        return [_pack(item, frames) for item in value]
    if isinstance(value, PackedGroup):
        frames += [value.header_frame, value.arrays_frame]
        return None
    if isinstance(value, Frame):
        frames.append(value)
        return None
    if isinstance(value, TensorEntries):
        frames.append(value.frame)
        return None
    if dataclasses.is_dataclass(value):
        return [_pack(getattr(value, name), frames) for name in _field_names(cls)]
    return value


def _take_group(value: Any, rest: Frames) -> PackedGroup:
    if value is not None or len(rest) < 2:
        raise WireError("a group's frames are missing")
    return read_group_header(bytes(rest.pop()), bytes(rest.pop()))


def _take_frame(value: Any, rest: Frames) -> Frame:
    if value is not None or not rest:
        raise WireError("a frame of bytes is missing")
    return rest.pop()


def _take_tensors(value: Any, rest: Frames) -> TensorEntries:
    entries = unpack_header(bytes(_take_frame(value, rest)), MAX_TENSORS_BYTES)
    if type(entries) is not list or len(entries) > MAX_TENSORS:
        raise WireError(f"a manifest's tensors are not a list of at most {MAX_TENSORS} entries")
    return TensorEntries(_read_tensor(entry, []) for entry in entries)


_read_tensor = record(TensorEntry, {})
_SENT_AS_THEY_ARE = {str, int, float, bool, dict}
_SPECIAL: dict[Any, Reader] = {
    PackedGroup: _take_group,
    Frame: _take_frame,
    tuple[TensorEntry, ...]: _take_tensors,
}
_KINDS: dict[str, Any] = {cls.__name__: cls for cls in typing.get_args(Message)}
_READERS: dict[type[Any], Reader] = {cls: record(cls, _SPECIAL) for cls in _KINDS.values()}
_FIELDS: dict[type[Any], tuple[str, ...]] = {}


def _field_names(cls: type[Any]) -> tuple[str, ...]:
    """Return the fields of a dataclass, looked up once per class."""
    if cls not in _FIELDS:
        _FIELDS[cls] = tuple(field_types(cls))
    return _FIELDS[cls]
