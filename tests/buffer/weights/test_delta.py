from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from buffer.weights import delta
from buffer.weights.delta import BLOCK_NUMBERS, SAMPLE_EVERY, DeltaError, Layout, apply, encode

WHOLE = 1 << 40
Bytes = NDArray[np.uint8]


def pair(seed: int, num_numbers: int, number_bytes: int, share: float, step: int) -> tuple[Bytes, Bytes]:
    """Random numbers, and a copy in which a share is moved by up to `step` units, or by any amount if `step` is 0."""
    chance = np.random.default_rng(seed)
    kind: Any = np.dtype(f"u{number_bytes}")
    old = chance.integers(0, 256, num_numbers * number_bytes, np.uint8).view(kind)
    moves = (
        chance.integers(0, np.iinfo(kind).max, num_numbers, kind)
        if not step
        else chance.integers(-step, step + 1, num_numbers)
    )
    new = np.where(chance.random(num_numbers) < share, old + moves.astype(kind), old)
    return old.view(np.uint8), new.astype(kind).view(np.uint8)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1 << 32),
    num_numbers=st.integers(1, 3000),
    number_bytes=st.sampled_from([1, 2, 4, 8]),
    share=st.sampled_from([0.0, 0.001, 0.3, 1.0]),
    step=st.sampled_from([0, 1, 100]),
)
def test_the_difference_gives_the_later_version_back_bit_by_bit(
    seed: int, num_numbers: int, number_bytes: int, share: float, step: int
):
    old, new = pair(seed, num_numbers, number_bytes, share, step)
    layout: Layout = [(0, len(old), number_bytes)]
    found = old.copy()
    apply(found, encode(old, new, layout, WHOLE), layout)
    assert np.array_equal(found, new)


def test_several_sizes_of_numbers_and_more_than_a_block():
    parts = [pair(1, BLOCK_NUMBERS + 5, 2, 0.03, 1), pair(2, 100, 4, 1.0, 900)]
    old, new = (np.concatenate(sides) for sides in zip(*parts, strict=True))
    middle = len(parts[0][0])
    layout: Layout = [(0, middle - 2, 2), (middle + 2, 4 * 99, 4)]
    made = encode(old, new, layout, WHOLE)
    # A changed number costs about five bits for its position and one or two for its change; 4-byte numbers cost more.
    assert len(made) < 0.05 * len(old)
    found = old.copy()
    apply(found, made, layout)
    covered = np.r_[0 : middle - 2, middle + 2 : middle + 2 + 4 * 99]
    assert np.array_equal(found[covered], new[covered])
    untouched = np.r_[middle - 2 : middle + 2, middle + 2 + 4 * 99 : len(old)]
    assert np.array_equal(found[untouched], old[untouched])


def test_a_difference_larger_than_the_limit_is_none():
    old, new = pair(3, 1000, 4, 1.0, 0)
    layout: Layout = [(0, len(old), 4)]
    size = len(encode(old, new, layout, WHOLE))
    assert encode(old, new, layout, size) and encode(old, new, layout, size - 1) == b""


def test_where_a_sample_shows_that_it_is_in_vain_the_rest_is_not_looked_at(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("buffer.weights.delta.BLOCK_NUMBERS", 100)
    old, new = pair(5, 100 * 10 * SAMPLE_EVERY, 2, 1.0, 0)
    encoded = []
    encode_block = delta._encode_block
    monkeypatch.setattr(delta, "_encode_block", lambda *blocks: encoded.append(1) or encode_block(*blocks))
    assert encode(old, new, [(0, len(old), 2)], len(old) // 2) == b""
    assert len(encoded) == 10


@settings(max_examples=100)
@given(
    position=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 10_000), extra=st.binary(max_size=4)
)
def test_damaged_bytes_raise_one_error_and_never_reach_beyond_the_array(
    position: int, value: int, cut: int, extra: bytes
):
    old, new = pair(4, 2000, 2, 0.2, 3)
    layout: Layout = [(0, len(old), 2)]
    damaged = bytearray(encode(old, new, layout, WHOLE))
    damaged[position % len(damaged)] = value
    with suppress(DeltaError):
        apply(old.copy(), bytes(damaged[: len(damaged) - cut % 50]) + extra, layout)


@pytest.mark.parametrize("data", [b"", b"\xff" * 6, bytes(6) + b"\0", b"\x01\0\0\0\x01\x01" + b"\xff\xff\xff\x7f"])
def test_what_is_no_difference_is_refused(data: bytes):
    with pytest.raises(DeltaError):
        apply(np.zeros(8, np.uint8), data, [(0, 8, 2)])
