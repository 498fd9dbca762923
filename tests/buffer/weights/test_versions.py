"""Segments are lent to ZeroMQ while their chunks are sent: none is overwritten, and at most one is held back."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from buffer.transport.messages import Chunk, ChunkRequest, Manifest, Refused
from buffer.weights.shared_memory import Segment, SegmentPool
from buffer.weights.versions import KeptVersions

SIZE = 1_000


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[SegmentPool]:
    made = SegmentPool(tmp_path / "weights")
    yield made
    made.close()


@pytest.fixture
def kept() -> Iterator[KeptVersions]:
    made = KeptVersions(2, lambda: None)
    yield made
    for segment in made.close():
        segment.remove()


def add(kept: KeptVersions, pool: SegmentPool, version: int) -> tuple[Segment, list[Segment]]:
    """Add a version whose bytes all equal its number. Returns its segment and the segments that are free again."""
    segment = pool.take(SIZE)
    segment.array[:] = version
    path = segment.publish(f"v{version}.weights")
    return segment, kept.add(Manifest(version, f"s:{version}", str(path), "host", SIZE, ()), segment)


def ask(kept: KeptVersions, version: int, number: int) -> Chunk | Refused | None:
    return kept.chunk(ChunkRequest(f"s:{version}", "", 100 * number, 100), (b"actor", number))


def test_a_segment_comes_back_when_the_last_of_its_chunks_is_gone(kept: KeptVersions, pool: SegmentPool):
    first, _ = add(kept, pool, 1)
    chunks = [ask(kept, 1, number) for number in range(3)]
    second, came_back = add(kept, pool, 2)
    assert came_back == []
    third, came_back = add(kept, pool, 3)
    assert came_back == []
    assert all(isinstance(chunk, Chunk) and chunk.data == bytes([1] * 100) for chunk in chunks)
    del chunks[:2]
    _, came_back = add(kept, pool, 4)
    assert came_back == [second]
    del chunks[:]
    _, came_back = add(kept, pool, 5)
    assert came_back == [first, third]


def test_chunks_are_copies_while_those_of_another_version_are_on_their_way(kept: KeptVersions, pool: SegmentPool):
    add(kept, pool, 1)
    lent = ask(kept, 1, 0)
    second, _ = add(kept, pool, 2)
    copied = ask(kept, 2, 1)
    add(kept, pool, 3)
    assert add(kept, pool, 4)[1] == [second]
    second.array[:] = 9
    assert isinstance(copied, Chunk) and copied.data == bytes([2] * 100)
    # Once no chunk is lent, the next one is lent again.
    del lent
    chunk = ask(kept, 4, 2)
    add(kept, pool, 5)
    assert add(kept, pool, 6)[1] == []
    assert isinstance(chunk, Chunk) and chunk.data == bytes([4] * 100)
    assert len(kept.close()) == 3


def test_a_request_that_is_repeated_while_its_answer_is_on_its_way_is_not_answered_again(
    kept: KeptVersions, pool: SegmentPool
):
    add(kept, pool, 1)
    chunk = ask(kept, 1, 0)
    assert ask(kept, 1, 0) is None
    assert isinstance(ask(kept, 1, 1), Chunk)
    assert isinstance(chunk, Chunk)
    # ZeroMQ also releases a chunk when the connection is lost.
    del chunk
    assert isinstance(ask(kept, 1, 0), Chunk)
