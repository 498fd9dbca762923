import contextlib
import dataclasses
import random
import typing
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.trajectory import FinishReason, Trajectory, TrajectoryGroup, VersionSpan
from buffer.transport import messages, schema
from buffer.transport.packed_group import PackedGroup, pack_group, read_group_header, unpack_group

NAME = st.from_regex(r"([a-zA-Z0-9_][a-zA-Z0-9_.:@-]{0,7})?", fullmatch=True)
LINE = st.text(max_size=8).filter(str.isprintable)
NUMBER = st.integers(0, 2**63 - 1)
FLOAT = st.floats(-1e300, 1e300)


@st.composite
def groups(draw: st.DrawFn) -> TrajectoryGroup:
    group_id, prompt_id = draw(NAME), draw(NUMBER)
    trajectories = []
    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(2, 6))
        mask = np.array(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        mask[0], mask[-1] = False, True
        logprobs = draw(st.lists(st.floats(-50, 0, width=32), min_size=length, max_size=length))
        starts = sorted(draw(st.sets(st.integers(0, length - 1), min_size=1)))
        versions = sorted(draw(st.lists(st.integers(0, 99), min_size=len(starts), max_size=len(starts))))
        trajectories.append(
            Trajectory(
                trajectory_id=draw(NAME),
                group_id=group_id,
                prompt_id=prompt_id,
                token_ids=np.array(
                    draw(st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length)), np.int32
                ),
                loss_mask=mask,
                behavior_logprobs=np.where(mask, logprobs, 0).astype(np.float32),
                policy_versions=tuple(VersionSpan(s, v) for s, v in zip(starts, versions, strict=True)),
                reward=draw(FLOAT),
                reward_breakdown=draw(st.dictionaries(LINE, FLOAT, max_size=2)),
                verdict=draw(LINE),
                finish_reason=draw(st.sampled_from(FinishReason)),
                num_turns=draw(st.integers(1, 5)),
                actor_id=draw(NAME),
                created_at=draw(FLOAT),
            )
        )
    return TrajectoryGroup(group_id, prompt_id, tuple(trajectories))


def values(wanted: Any) -> st.SearchStrategy[Any]:
    """Values of one field annotation."""
    if wanted is PackedGroup:
        return groups().map(pack_group)
    arguments = typing.get_args(wanted)
    if wanted is schema.Role:
        return st.sampled_from(["actor", "learner"])
    if typing.get_origin(wanted) is typing.Annotated:
        kind, limit = arguments
        if typing.get_origin(kind) is dict:
            return values(kind)
        if isinstance(limit, schema.Text):
            return NAME.filter(bool) if limit.pattern else LINE
        return st.integers(int(limit.least), int(limit.most)) if kind is int else st.floats(limit.least, limit.most)
    simple = {bool: st.booleans(), float: FLOAT, messages.Frame: st.binary(max_size=8)}
    if wanted in simple:
        return simple[wanted]
    if typing.get_origin(wanted) is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    if typing.get_origin(wanted) is tuple and arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if typing.get_origin(wanted) is tuple:
        return st.tuples(*(values(argument) for argument in arguments))
    return messages_of(wanted)


def messages_of(cls: Any) -> st.SearchStrategy[Any]:
    return st.builds(cls, *(values(wanted) for wanted in schema.field_types(cls).values()))


def decode(frames: list[bytes]) -> tuple[messages.Message, int]:
    return messages.decode(frames, "run")


MESSAGES = st.one_of([messages_of(cls) for cls in typing.get_args(messages.Message)])


def same(left: Any, right: Any) -> bool:
    if isinstance(left, PackedGroup):
        return left.header_frame == right.header_frame and left.arrays_frame == right.arrays_frame
    return bool(left == right)


@settings(max_examples=200, deadline=None)
@given(MESSAGES, NUMBER)
def test_every_message_comes_back_as_it_was(message: Any, number: int):
    decoded, decoded_number = decode(messages.encode(message, number, "run"))
    assert same(decoded, message)
    assert decoded_number == number


@settings(max_examples=60, deadline=None)
@given(groups())
def test_a_group_comes_back_with_equal_arrays(group: TrajectoryGroup):
    packed = pack_group(group)
    again = unpack_group(read_group_header(packed.header_frame, packed.arrays_frame))
    assert (again.group_id, again.prompt_id, again.oldest_version) == (
        group.group_id,
        group.prompt_id,
        group.oldest_version,
    )
    for left, right in zip(again.trajectories, group.trajectories, strict=True):
        assert np.array_equal(left.token_ids, right.token_ids)
        assert np.array_equal(left.loss_mask, right.loss_mask)
        assert np.array_equal(left.behavior_logprobs, right.behavior_logprobs)
        arrays = ("token_ids", "loss_mask", "behavior_logprobs")
        rest = [name for name in Trajectory.__slots__ if name not in arrays]
        assert all(getattr(left, name) == getattr(right, name) for name in rest)


@settings(max_examples=100, deadline=None)
@given(MESSAGES, st.data())
def test_a_truncated_message_is_refused(message: Any, data: st.DataObject):
    frames = messages.encode(message, 1, "run")
    cut = data.draw(st.integers(0, len(frames) - 1))
    with pytest.raises(messages.WireError):
        decode(frames[:cut])
    with pytest.raises(messages.WireError):
        decode([*frames, b""])
    with pytest.raises(messages.WireError):
        decode([frames[0][:-1], *frames[1:]])


def mutate(frames: list[bytes], chance: random.Random) -> list[bytes]:
    frames = list(frames)
    at = chance.randrange(len(frames))
    frame = bytearray(frames[at])
    match chance.randrange(5):
        case 0:
            for _ in range(chance.randint(1, 4)):
                if frame:
                    frame[chance.randrange(len(frame))] = chance.randrange(256)
        case 1:
            del frame[chance.randrange(len(frame) + 1) :]
        case 2:
            place = chance.randrange(len(frame) + 1)
            frame[place:place] = chance.randbytes(chance.randint(1, 9))
        case 3:
            frames.insert(chance.randrange(len(frames) + 1), chance.randbytes(chance.randint(0, 20)))
        case 4:
            frame = bytearray(chance.randbytes(len(frame)))
    frames[at] = bytes(frame)
    return frames


@settings(max_examples=80, deadline=None)
@given(MESSAGES, st.integers(0, 2**32))
def test_a_mutated_message_raises_a_wire_error_or_nothing(message: Any, seed: int):
    chance, frames = random.Random(seed), messages.encode(message, 1, "run")
    for _ in range(50):
        with contextlib.suppress(messages.WireError):
            decoded, _ = decode(mutate(frames, chance))
            if isinstance(decoded, messages.GroupDelivery):
                unpack_group(decoded.group)


def header(*fields: Any) -> list[bytes]:
    return [msgpack.packb(list(fields), use_bin_type=True)]


MANY = {str(number): 0.0 for number in range(65)}
HELLO = [-1, [], "", "", -1]


@pytest.mark.parametrize(
    ("frames", "complaint"),
    [
        ([], "0 frames"),
        ([b"\xc1"], "not msgpack"),
        ([b"\x90" * 2], "not msgpack"),
        (header(2, "Done"), r"not \[schema"),
        (header(1, "run", "Done", 0, []), "this process speaks schema"),
        (header(messages.SCHEMA, "run", "Exploit", 0, []), "unknown kind"),
        (header(messages.SCHEMA, "run", ["Done"], 0, []), "the kind is no text"),
        (header(messages.SCHEMA, "run", "Done", -1, []), "request number"),
        (header(messages.SCHEMA, "run", "Done", 2**64 - 1, []), "request number"),
        (header(messages.SCHEMA, "run", "Done", True, []), "request number"),
        (header(messages.SCHEMA, "run", "Done", 0, [1]), "has 0 fields"),
        (header(messages.SCHEMA, "run", "LearnerHello", 0, ["3", *HELLO]), "expected int, got str"),
        (header(messages.SCHEMA, "run", "LearnerHello", 0, [True, *HELLO]), "expected int, got bool"),
        (header(messages.SCHEMA, "run", "LearnerHello", 0, [2**63, *HELLO]), "is not between"),
        (
            header(
                messages.SCHEMA, "run", "Heartbeat", 0, ["actor", "b", 0, "", {"x": "y"}, [], [], 0, "", 0.0, 0, 0.0]
            ),
            "expected",
        ),
        (
            header(messages.SCHEMA, "run", "Heartbeat", 0, ["spy", "b", 0, "", {}, [], [], 0, "", 0.0, 0, 0.0]),
            "characters that are not",
        ),
        (
            header(
                messages.SCHEMA,
                "run",
                "Heartbeat",
                0,
                ["actor", "b", 0, "", {f"{i}": 0 for i in range(65)}, [], [], 0, "", 0.0, 0, 0.0],
            ),
            "at most 64",
        ),
        (
            header(
                messages.SCHEMA, "run", "Heartbeat", 0, ["actor", "b", 0, "", {"x" * 65: 0}, [], [], 0, "", 0.0, 0, 0.0]
            ),
            "at most 64",
        ),
        (header(messages.SCHEMA, "run", "GroupDelivery", 0, ["a", None]), "frames are missing"),
        (header(messages.SCHEMA, "run", "Chunk", 0, [1, "", None]), "frame of bytes is missing"),
    ],
)
def test_what_is_wrong_is_named(frames: list[bytes], complaint: str):
    with pytest.raises(messages.WireError, match=complaint):
        decode(frames)


@pytest.mark.parametrize(
    ("held", "complaint"),
    [
        (["1.0", "2.0\n3.0"], r"'2.0\\n3.0' has characters that are not"),
        (["1.0", "2.0\n"], r"'2.0\\n' has characters"),
        (["1.0", "2 0", "3.0"], "'2 0' has characters"),
        (["1.0", "x" * 129], "129 characters"),
        (["1.0", 2], "expected str, got int"),
    ],
)
def test_each_of_many_names_is_checked(held: list[Any], complaint: str):
    names = messages.LeaseReturn("actor-0", ("1.0", "", "2.0"), "")
    assert decode(messages.encode(names, 5, "run"))[0] == names
    with pytest.raises(messages.WireError, match=complaint):
        decode(header(messages.SCHEMA, "run", "LeaseReturn", 0, ["actor-0", held, ""]))


def test_sizes_are_checked_before_decoding(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(schema, "MAX_HEADER_BYTES", 10)
    with pytest.raises(messages.WireError, match="at most 10"):
        decode([b"\x93" + b"x" * 20])
    monkeypatch.setattr(messages, "MAX_FRAME_BYTES", 5)
    with pytest.raises(messages.WireError, match="larger than 5"):
        decode([b"123456"])


def test_a_group_must_not_pretend_to_be_younger_than_its_tokens(make_group: Any):
    packed = make_group("0.0", 3, version=4)
    fields = msgpack.unpackb(packed.header_frame)
    fields[2] = 9
    with pytest.raises(messages.WireError, match="oldest_version 9"):
        read_group_header(msgpack.packb(fields), packed.arrays_frame)


def test_a_mask_that_is_no_mask_is_refused(make_group: Any):
    packed = make_group("0.0", 3)
    arrays = packed.arrays_frame[:-1] + b"\x02"
    with pytest.raises(messages.WireError, match="loss mask holds 2"):
        unpack_group(read_group_header(packed.header_frame, arrays))


def test_a_large_frame_stays_where_it_was_received():
    chunk = messages.Chunk(0, "0123456789abcdef", bytes(range(256)))
    header, data = messages.encode(chunk, 7, "run")
    received = memoryview(bytearray(data))
    decoded, _ = messages.decode([header, received], "run")
    assert decoded == chunk
    assert isinstance(decoded, messages.Chunk) and decoded.data is received


def entries(number: int) -> tuple[messages.TensorEntry, ...]:
    return tuple(
        messages.TensorEntry(
            f"model.layers.{i}.mlp.experts.{i}.down_proj.weight", "bfloat16", (768, 2048), i, 1, "0" * 16
        )
        for i in range(number)
    )


def test_the_tensors_of_a_version_are_packed_once_for_all_readers(monkeypatch: pytest.MonkeyPatch):
    manifest = messages.Manifest(3, "s:3", "/run/v3", "host", 100, entries(50))
    frames = messages.encode(manifest, 1, "run")
    packed, pack = [], msgpack.packb
    monkeypatch.setattr(msgpack, "packb", lambda value, **how: packed.append(value) or pack(value, **how))
    for number, relay in enumerate(("", "tcp://127.0.0.1:1")):
        sent = messages.encode(dataclasses.replace(manifest, relay=relay), number, "run")
        assert sent[1] is frames[1]
        assert decode(sent) == (dataclasses.replace(manifest, relay=relay), number)
    # Only the two headers, which do not hold the tensors.
    assert len(packed) == 2


def test_a_manifest_may_name_every_expert_of_a_large_model():
    manifest = messages.Manifest(3, "s:3", "/run/v3", "host", 100, entries(45_000))
    assert decode(messages.encode(manifest, 1, "run"))[0] == manifest


def test_broken_tensors_of_a_manifest_are_refused():
    header, packed = messages.encode(messages.Manifest(3, "s:3", "/run/v3", "host", 100, entries(2)), 1, "run")
    for broken in (b"", packed[:-1], packed + packed, msgpack.packb({}), msgpack.packb([[1]]), msgpack.packb([[]])):
        with pytest.raises(schema.WireError):
            decode([header, broken])
