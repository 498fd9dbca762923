"""Mutated and extreme messages against the real service: `python -m tests.buffer.fuzz --minutes 30 [--seed N]`.

Messages of every kind, with the ids and versions of a real ledger, are encoded, mutated once or twice and decoded as by
a server. Decoding may raise only WireError. Messages that are still valid go to the service, turn by turn as in the
server, and a client must be able to decode its answers. Other messages stay sound, but come in any order, from any
role, of any learner, and with the most extreme numbers that their fields allow. A message that raises would be refused
(`buffer/service/turn.py`); here it fails the test. At the end the ledger's audit must hold, and a correct actor and
learner must be served. Every configuration in `WAYS` has its turn.
"""

import argparse
import dataclasses
import math
import random
import re
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from buffer.config import BufferConfig
from buffer.curriculum_config import Skip, Stage, write_levels
from buffer.ledger.audit import audit
from buffer.ledger.ledger import Ledger
from buffer.service.leases import Outgoing
from buffer.service.turn import Turns
from buffer.trajectory import FinishReason, Trajectory, TrajectoryGroup, VersionSpan
from buffer.transport import messages as wire
from buffer.transport.packed_group import PackedGroup, pack_group, unpack_group
from buffer.transport.roles import ROLES
from buffer.transport.router import Incoming, read_incoming
from buffer.transport.schema import WireError, field_types

RUN_ID = "fuzzed"
PER_TRANSACTION = 64
Frames = list[bytes]
STAGES = [
    Stage(max_level=1, until_success=0.6, over_groups=3, at_least_steps=1, at_most_steps=5, samples_per_group=3),
    Stage(min_level=2, until_step=6, samples_per_group=2, max_new_tokens=7),
    Stage(),
]

EVIL: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**40, 2**40 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)),
    *(math.nan, math.inf, -math.inf, 1e308, -0.0, 1e-320),
    *(
        "",
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "a\nb",
        "\x00",
        "\x1b[2J",
        "\ud800",
        "\u202e",
        "x" * 5000,
        "é" * 200,
    ),
    *(b"", b"\xff" * 9, [], [[]], {}, {"a": math.nan}, {1: 2}, [0] * 70_000, msgpack.ExtType(5, b"x")),
    *("0.0", "999999999999999999.0", "0.999999999999999999", "99999999999999999999999.0", "-1.0", "٣.٠"),
)
CLAIMS = (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff")
"""An array, a map, a text and bytes that claim to be 4 GiB long."""


def group_of(group_id: str, prompt_id: int, version: int, size: int = 2, newer: int = 1) -> PackedGroup:
    mask = np.arange(6) >= 2
    trajectories = tuple(
        Trajectory(
            trajectory_id=f"{group_id}.{number}",
            group_id=group_id,
            prompt_id=prompt_id,
            token_ids=np.arange(6, dtype=np.int32),
            loss_mask=mask,
            behavior_logprobs=np.where(mask, -0.5, 0.0).astype(np.float32),
            policy_versions=(VersionSpan(0, version), VersionSpan(3, version + newer)),
            reward=float(number),
            reward_breakdown={"correct": float(number)},
            verdict="correct",
            finish_reason=FinishReason.STOP,
            actor_id="actor-0",
        )
        for number in range(size)
    )
    return pack_group(TrajectoryGroup(group_id, prompt_id, trajectories))


WAYS: list[dict[str, Any]] = [
    {},
    {"updates_per_batch": 2, "groups_per_batch": 4},
    {"updates_per_batch": 2, "groups_per_batch": 4, "on_stale": "drop", "max_uses": 2},
    {"max_uses": 2, "sampler": "freshest", "drop_no_signal": True, "max_no_signal": 5},
    {"max_uses": 3, "sampler": "uniform"},
    {"sampler": "prioritized", "drop_no_signal": True},
    {"on_stale": "drop", "max_reissues": 1, "sampler": "prioritized"},
    {"on_stale": "drop", "max_reissues": 0, "max_uses": 2, "sampler": "uniform"},
    {"on_stale": "mask"},
    {"on_stale": "mask", "max_uses": 2},
    {"on_stale": "mask", "updates_per_batch": 2, "groups_per_batch": 4},
    {"num_batches": 3},
    {"max_staleness": 0},
    {"stages": STAGES, "skip_solved": Skip(success=1.0, seen=1), "skip_unsolved": Skip(success=0.0, seen=2)},
    {"vocab_size": 6, "max_tokens": 6, "samples_per_group": 2},
]
"""Configurations, as in the ledger's tests and more."""


class StrictTurns(Turns):
    """As in the server, but an error while a message is handled is remembered, to be raised."""

    error: Exception | None = None

    def note_error(self, what: str, whose: str, error: Exception) -> None:
        error.add_note(f"while {what} of {whose} was handled")
        self.error = error
        super().note_error(what, whose, error)


class Buffer:
    """A ledger and its service, and what a correct client would know of them."""

    def __init__(self, run_dir: Path, way: dict[str, Any] | None = None) -> None:
        settings = {"groups_per_batch": 2, "max_staleness": 2, "lease_seconds": 5.0, "durability": "memory"}
        self.config = BufferConfig(str(run_dir), "ipc://none", 50, "abc", **(settings | (way or {})))  # type: ignore[arg-type]
        write_levels(run_dir, [1 + number % 3 for number in range(50)])
        self.run_dir, self.now, self.number, self.version, self.epoch = run_dir, 0.0, 0, 0, 0
        self.identities = (b"actor-0-0", b"actor-1-0", b"learner-0-0")
        self.leases: list[wire.Lease] = []
        self.ledger = Ledger(self.config, self.now)
        self.turns = StrictTurns(self.config, self.ledger)

    def turn(self, incoming: list[Incoming], seconds: float = 0.05) -> list[Outgoing]:
        """Handle one turn's messages as the server does. Returns the answers, as a client decodes them."""
        self.now += seconds
        outgoing = self.turns.carry_out(incoming, False, self.now)
        if self.turns.error is not None:
            raise self.turns.error
        return [self._learn(answer) for answer in outgoing]

    def _learn(self, answer: Outgoing) -> Outgoing:
        message, number = wire.decode(wire.encode(answer.message, answer.request_number, RUN_ID), RUN_ID)
        match message:
            case wire.LeaseReply():
                self.leases = (self.leases + list(message.leases))[-8:]
            case wire.Shard():
                self.version = message.policy_version + self.config.updates_per_batch
            case wire.LearnerWelcome():
                self.epoch = message.epoch
                self.version = self.ledger.file.meta("next_version", 0)
        return Outgoing(answer.identity, number, message)

    def ask(self, identity: bytes, message: wire.Message) -> list[wire.Message]:
        """The answers to a valid message of the newest learner, or of an actor."""
        self.number += 1
        outgoing = self.turn([Incoming(identity, wire.with_epoch(message, self.epoch), self.number)], 0.0)
        return [answer.message for answer in outgoing if answer.identity == identity]

    def sound(self, chance: random.Random) -> list[Incoming]:
        """Valid messages, so that leases, deliveries, batches and commits continue between the broken ones."""
        self.number += 1_000_000
        if chance.random() < 0.05:
            # Act as new processes: a mutant may have used a request number that no client reaches.
            self.identities = tuple(name + b"-%d" % self.number for name in (b"actor-0", b"actor-1", b"learner-0"))
        actor, learner = chance.choice(self.identities[:2]), self.identities[2]
        name = actor.decode()[:7]
        said: list[tuple[bytes, wire.Message]] = [
            (actor, wire.GroupDelivery(name, group_of(lease.group_id, lease.prompt_id, self.version)))
            for lease in self.leases
        ]
        if chance.random() < 0.2:
            said.append((learner, wire.LearnerHello(chance.randrange(self.version + 1))))
        said.append((learner, wire.CheckpointCommitted(max(0, self.version - 2))))
        said.append((learner, wire.BatchRequest(self.version, 0, 1)))
        said.append((actor, wire.LeaseRequest(name, self.version, 4, "abc", tuple(x.group_id for x in self.leases))))
        return [
            Incoming(identity, wire.with_epoch(message, self.epoch), self.number, identity.partition(b"-")[0].decode())
            for identity, message in said
        ]

    def messages(self, chance: random.Random) -> list[wire.Message]:
        """One message of every kind, with ids and versions that are valid now."""
        lease = chance.choice(self.leases) if self.leases else wire.Lease("0.0", 0)
        version = max(0, self.version - chance.randrange(3))
        group = group_of(lease.group_id, lease.prompt_id, version)
        report = wire.EvaluationReport("actor-0", version, version, 10, 0.5, 0.2, 12.0, 1.0)
        peer = wire.Peer("actor", "actor-0", version, "", 0.5, {"actor/tokens": 1.0})
        probe = wire.Probe(chance.randrange(3), version, (5, 6, 7), 2)
        probed = wire.ProbeReport("actor-0", chance.randrange(3), version, (-0.5, -0.25), 0.1)
        tensor = wire.TensorEntry("layer.0", "float32", (2, 3), 64, 24, "0123456789abcdef")
        found: list[wire.Message] = [
            wire.LeaseRequest("actor-0", version, chance.randrange(9), "abc"),
            wire.LeaseReply((lease,), -1, False),
            wire.GroupDelivery("actor-0", group),
            wire.GroupReceipt(lease.group_id, "stored"),
            wire.LeaseReturn("actor-0", (lease.group_id, "0.1"), chance.choice(["", "prompt_too_long"])),
            wire.Heartbeat(chance.choice(["actor", "learner"]), "actor-0", version, "prompts", {"actor/tokens": 1.0}),
            wire.Heartbeat("actor", "actor-0", version, "", {}, (lease.group_id,), (version,)),
            wire.HeartbeatReply(version, False, (), (probe,)),
            report,
            wire.ProbeRequest(probe),
            probed,
            wire.ProbeReports((probed,), 1, 2),
            wire.Done(),
            wire.Refused("no such thing"),
            wire.LearnerHello(version),
            wire.LearnerHello(version, version, tuple(x.group_id for x in self.leases), "it failed", f"{self.number}"),
            wire.LearnerWelcome(1, 2),
            wire.BatchRequest(self.version, chance.randrange(2), chance.randint(1, 4)),
            wire.Shard(version, 2, (0,), (group,)),
            wire.CheckpointCommitted(version),
            wire.EvaluationRequest(version),
            wire.EvaluationQuery(0),
            wire.EvaluationReports((report,)),
            wire.Close(),
            wire.StatusRequest(),
            wire.Status({"leased": 1}, version, False, (peer,), (report,)),
            wire.ManifestRequest("abc:1", 1.0),
            wire.Manifest(version, "abc:1", "/run/weights/v1.weights", "host", 88, (tensor,)),
            wire.NoNewVersion(),
            wire.RelayHello("tcp://127.0.0.1:5556", "host"),
            wire.RelayPlace("tcp://127.0.0.1:5557"),
            wire.DeltaRequest("abc:2", "abc:1"),
            wire.DeltaReply(24, "0123456789abcdef"),
            wire.ChunkRequest("abc:2", "abc:1", 0, 24),
            wire.Chunk(0, "0123456789abcdef", b"bytes"),
            wire.CheckpointBegun(version),
            wire.GroupRequest(version, int(lease.group_id.partition(".")[0])),
            wire.ShardGroup(group),
        ]
        return [wire.with_epoch(message, self.epoch) for message in found]


# Sound messages with extreme values.

types_of = cache(field_types)


def extreme(message: Any, known: list[Any], chance: random.Random) -> Any:
    """A copy of a message in which some numbers, texts and lengths are the most extreme ones that are allowed.

    Args:
        message: any message.
        known: values that occur in the run: versions, ids, names.
        chance: decides.
    """
    changes = {}
    for name, wanted in types_of(type(message)).items():
        if chance.random() < 0.4:
            changes[name] = _extreme(wanted, getattr(message, name), known, chance)
    return replace(message, **changes)


def _extreme(wanted: Any, value: Any, known: list[Any], chance: random.Random) -> Any:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if dataclasses.is_dataclass(value) and not isinstance(value, PackedGroup):
        return extreme(value, known, chance)
    if origin is tuple and arguments[-1] is Ellipsis:
        items = list(value) * chance.choice([0, 1, 2, 50])
        return tuple(_extreme(arguments[0], item, known, chance) for item in items)
    if origin is not typing.Annotated or isinstance(value, dict | float):
        return value
    if isinstance(value, str):
        pattern = re.compile(arguments[1].pattern or ".*")
        return chance.choice([value, *(text for text in known if isinstance(text, str) and pattern.fullmatch(text))])
    least, most = int(arguments[1].least), int(arguments[1].most)
    numbers = [number for number in known if isinstance(number, int) and least <= number <= most]
    return chance.choice([least, least + 1, most - 1, most, *numbers])


# Mutations.


def flip_bits(frames: Frames, other: Frames, chance: random.Random) -> None:
    at = chance.randrange(len(frames))
    frame = bytearray(frames[at])
    for _ in range(chance.randint(1, 3) if frame else 0):
        frame[chance.randrange(len(frame))] ^= 1 << chance.randrange(8)
    frames[at] = bytes(frame)


def cut(frames: Frames, other: Frames, chance: random.Random) -> None:
    at = chance.randrange(len(frames))
    frames[at] = frames[at][: chance.randrange(len(frames[at]) + 1)]


def grow(frames: Frames, other: Frames, chance: random.Random) -> None:
    at = chance.randrange(len(frames))
    place = chance.randrange(len(frames[at]) + 1)
    grown = chance.choice([chance.randbytes(chance.randint(1, 9)), chance.choice(CLAIMS), b"\x91" * 3000])
    frames[at] = frames[at][:place] + grown + frames[at][place:]


def move_frames(frames: Frames, other: Frames, chance: random.Random) -> None:
    at = chance.randrange(len(frames))
    match chance.randrange(4):
        case 0:
            frames.insert(at, chance.choice(other))
        case 1:
            del frames[at]
        case 2:
            with_at = chance.randrange(len(frames))
            frames[at], frames[with_at] = frames[with_at], frames[at]
        case 3:
            frames.insert(at, frames[at])


def splice(frames: Frames, other: Frames, chance: random.Random) -> None:
    """Join the beginning of one message with the end of another, by frames or by bytes of one frame."""
    if chance.random() < 0.5:
        frames[chance.randrange(1, len(frames) + 1) :] = other[chance.randrange(len(other) + 1) :]
    else:
        frames[0] = frames[0][: chance.randrange(len(frames[0]) + 1)] + other[0][chance.randrange(len(other[0])) :]


def change_value(frames: Frames, other: Frames, chance: random.Random) -> None:
    """Replace a value at a random place of a header, which stays valid msgpack."""
    at = chance.choice([0, *range(1, len(frames), 2)])
    try:
        value = msgpack.unpackb(frames[at], strict_map_key=False)
        frames[at] = msgpack.packb(_changed(value, chance), unicode_errors="surrogatepass")
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException):
        pass  # The frame is no msgpack after an earlier mutation, or the new value cannot be packed: nothing changes.


def _changed(value: Any, chance: random.Random) -> Any:
    if isinstance(value, list) and value and chance.random() < 0.85:
        at, copy = chance.randrange(len(value)), list(value)
        match chance.randrange(12):
            case 0:
                del copy[at]
            case 1:
                copy.insert(at, copy[at])
            case _:
                copy[at] = _changed(copy[at], chance)
        return copy
    if isinstance(value, dict) and value and chance.random() < 0.7:
        key = chance.choice(list(value))
        if chance.random() < 0.5:
            return value | {key: _changed(value[key], chance)}
        evil = chance.choice(EVIL)
        return value | {evil if isinstance(evil, str | int | bytes | float) else "b": value[key]}
    if type(value) is int and chance.random() < 0.4:
        return value + chance.choice([-2, -1, 1, 2, 1 << 30])
    return chance.choice(EVIL)


MUTATIONS: tuple[Callable[[Frames, Frames, random.Random], None], ...] = (
    *(flip_bits, cut, grow, move_frames, splice),
    *(change_value, change_value, change_value, change_value),
)


def mutant(messages: list[wire.Message], number: int, chance: random.Random) -> Frames:
    frames = wire.encode(chance.choice(messages), number, RUN_ID)
    other = wire.encode(chance.choice(messages), number, chance.choice([RUN_ID, "another"]))
    for _ in range(chance.choice([1, 1, 2])):
        if frames:
            chance.choice(MUTATIONS)(frames, other, chance)
    return frames


# The run.


@contextmanager
def naming(seed: int, index: int, way: Any, sent: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    except WireError:
        raise
    except BaseException as error:
        error.add_note(f"fuzz seed {seed}, {way}, mutant {index}; the last ones: {[repr(m)[:500] for m in sent[-4:]]}")
        raise


def fuzz(run_dir: Path, seed: int, enough: Callable[[int], bool], way: dict[str, Any] | None = None) -> tuple[int, int]:
    """Send mutants until `enough` of their number is true. Returns the numbers of sent and of valid ones.

    As many sound messages with extreme values are sent beside the valid mutants.
    """
    chance, buffer = random.Random(seed), Buffer(run_dir, way)
    index = num_sound = 0
    while not enough(index):
        messages = buffer.messages(chance)
        said, sent = buffer.sound(chance), []
        for _ in range(PER_TRANSACTION):
            index += 1
            # The messages name actor-0. From another connection they would take its name over, and what follows from
            # the first connection would only be refused.
            identity = chance.choice(buffer.identities) if chance.random() < 0.02 else buffer.identities[0]
            role = chance.choice(["", "", *ROLES])
            sent.append(mutant(messages, chance.randrange(index + 1), chance))
            with naming(seed, index, way, sent[-1:]), suppress(WireError):
                said.append(read_incoming(identity, sent[-1], RUN_ID, role))
                num_sound += 1
            if chance.random() < 0.15:
                known = [buffer.version, buffer.epoch, *(x.group_id for x in buffer.leases), "", "actor-0", "abc"]
                frames = wire.encode(extreme(chance.choice(messages), known, chance), chance.randrange(index), RUN_ID)
                with naming(seed, index, way, frames):
                    said.append(read_incoming(identity, frames, RUN_ID, role))
        chance.shuffle(said)
        with naming(seed, index, way, sent):
            buffer.turn(said, chance.choice([0.0, 0.05, 0.05, 6.0]))
    with naming(seed, index, way, []):
        finish(buffer)
    return index, num_sound


def finish(buffer: Buffer) -> None:
    """Check that the ledger's invariants hold, and that a correct learner and a correct actor are served."""
    (welcome,) = buffer.ask(b"learner-9", wire.LearnerHello(0))
    assert isinstance(welcome, wire.LearnerWelcome), welcome
    for _ in range(3):
        buffer.turn([], 10.0)
    size = buffer.config.groups_per_batch
    answers = buffer.ask(b"actor-9", wire.LeaseRequest("actor-9", 0, 2 * size, "abc"))
    for lease in [lease for reply in answers if isinstance(reply, wire.LeaseReply) for lease in reply.leases]:
        (receipt,) = buffer.ask(b"actor-9", wire.GroupDelivery("actor-9", group_of(lease.group_id, lease.prompt_id, 0)))
        assert receipt == wire.GroupReceipt(lease.group_id, "stored")
    (shard,) = buffer.ask(b"learner-9", wire.BatchRequest(0, 0, 1))
    assert isinstance(shard, wire.Shard), shard
    assert [unpack_group(group).group_id for group in shard.groups]
    assert "message_errors" not in buffer.ledger.file.counters()
    found = audit(buffer.run_dir)
    buffer.ledger.close()
    assert found.holds, found.problems


def fuzz_all_ways(seed: int, enough: Callable[[int, int], bool]) -> tuple[int, int]:
    """Fuzz every configuration until `enough`, given its place in `WAYS` and its number of mutants.

    Returns the numbers of sent and of valid mutants.
    """
    sent = sound = 0
    for place, way in enumerate(WAYS):
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            more, valid = fuzz(Path(folder), seed + place, lambda number, place=place: enough(place, number), way)  # type: ignore[misc]
        sent, sound = sent + more, sound + valid
    return sent, sound


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.buffer.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    seconds, begin = 60 * options.minutes / len(WAYS), time.monotonic()
    sent, sound = fuzz_all_ways(options.seed, lambda place, _: time.monotonic() > begin + (place + 1) * seconds)
    print(f"{sent} mutated messages, {sound} of them still sound; nothing raised, the ledger holds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
