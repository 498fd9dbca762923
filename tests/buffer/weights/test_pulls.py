"""Pulls get a turn, a few at a time and the newest version first, so that they end although versions are dropped."""

from collections import deque
from collections.abc import Mapping

import pytest

from buffer.transport.messages import ChunkRequest
from buffer.weights.pulls import IDLE_SECONDS, LOST_SECONDS, PullQueue

VERSIONS = {"s:1": 1, "s:2": 2}


def ask(queue: PullQueue, reader: str, publication: str, *offsets: int, now: float = 0.0) -> None:
    for offset in offsets:
        queue.add(reader.encode(), offset, ChunkRequest(publication, "", offset, 1), now)


def order(queue: PullQueue, limit: int = 100, now: float = 0.0) -> list[str]:
    """The readers that are answered, in order; the offset 9 is the end of every pull."""
    readers: list[str] = []
    while len(readers) < limit and (due := queue.take(VERSIONS, now)) is not None:
        readers.append(due[0].decode())
        if due[2].offset == 9:
            queue.end(due[0])
    return readers


def test_pulls_take_turns_a_few_at_a_time_and_the_newest_version_first():
    queue = PullQueue(2)
    for reader in ("a", "b", "c"):
        ask(queue, reader, "s:1", 0, 9)
    ask(queue, "new", "s:2", 0, 9)
    # Each pull that ends gives its turn on. Two pulls with a turn alternate.
    assert order(queue) == ["new", "new", "a", "a", "b", "b", "c", "c"]
    for reader in ("a", "b", "c"):
        ask(queue, reader, "s:1", 0)
    assert order(queue) == ["a", "b"]
    ask(queue, "a", "s:1", 1, 9)
    ask(queue, "b", "s:1", 1, 9)
    assert order(queue) == ["a", "b", "a", "b", "c"]


def test_a_request_that_is_sent_again_is_answered_once():
    queue = PullQueue(2)
    ask(queue, "a", "s:1", 0)
    ask(queue, "a", "s:1", 0)
    assert order(queue) == ["a"]


def test_a_reader_that_turns_to_another_version_no_longer_gets_the_first():
    queue = PullQueue(1)
    ask(queue, "a", "s:1", 0, 1, 2)
    ask(queue, "a", "s:2", 5)
    due = queue.take(VERSIONS, 0.0)
    assert due is not None and due[2].publication == "s:2"
    assert queue.take(VERSIONS, 0.0) is None


def test_requests_for_a_version_that_is_not_kept_are_due_at_once():
    queue = PullQueue(1)
    ask(queue, "a", "s:1", 0)
    assert order(queue) == ["a"]
    ask(queue, "b", "s:0", 0)
    assert order(queue) == ["b"]


def test_an_idle_pull_loses_its_turn_and_a_lost_one_its_requests():
    queue = PullQueue(1)
    ask(queue, "a", "s:1", 0)
    assert order(queue) == ["a"]
    ask(queue, "b", "s:1", 0)
    assert order(queue, now=IDLE_SECONDS - 1) == []
    assert order(queue, now=IDLE_SECONDS + 1) == ["b"]
    ask(queue, "c", "s:1", 0, now=IDLE_SECONDS + 1)
    assert order(queue, now=IDLE_SECONDS + LOST_SECONDS + 2) == []


class EqualShares(PullQueue):
    """Answers the requests in the order in which they came."""

    def take(self, versions: Mapping[str, int], now: float) -> tuple[bytes, int, ChunkRequest] | None:
        for identity, pull in self._pulls.items():
            if pull.requests:
                del self._pulls[identity]
                self._pulls[identity] = pull
                return self._pop(identity, pull)
        return None


def finished(
    queue: PullQueue, *, num_readers: int, num_chunks: int, chunks_per_version: int, keep: int, versions: int
) -> int:
    """Pulls that end. The link carries one chunk per step; a version appears every `chunks_per_version` steps."""
    done = 0
    kept = deque([0], maxlen=keep)
    goals = dict.fromkeys(range(num_readers), 0)
    offsets = dict.fromkeys(range(num_readers), 0)
    for reader in range(num_readers):
        ask(queue, str(reader), "s:0", 0)
    for step in range(1, chunks_per_version * versions):
        if step % chunks_per_version == 0:
            kept.append(kept[-1] + 1)
        names = {f"s:{version}": version for version in kept}
        while (due := queue.take(names, 0.0)) is not None:
            reader, goal, offset = int(due[0]), due[2].publication, due[2].offset
            if goal not in names:
                # Refused: the reader asks for the newest version from its start.
                goals[reader], offsets[reader] = kept[-1], 0
                ask(queue, str(reader), f"s:{kept[-1]}", 0)
                continue
            assert offset == offsets[reader]
            offsets[reader] += 1
            if offsets[reader] == num_chunks:
                queue.end(due[0])
                done, goals[reader], offsets[reader] = done + 1, kept[-1], 0
            ask(queue, str(reader), f"s:{goals[reader]}", offsets[reader])
            break
    return done


@pytest.mark.parametrize("num_readers", [20, 100])
def test_on_a_busy_link_pulls_end_where_equal_shares_would_end_none(num_readers: int):
    """A link that can carry 3 pulls while a version is kept."""
    busy = {"num_chunks": 50, "chunks_per_version": 50, "keep": 3, "versions": 40}
    assert finished(EqualShares(1), num_readers=num_readers, **busy) <= 2
    # 40 fit on the link. Too many turns at first are taken back.
    for most in (4, 20):
        assert finished(PullQueue(most), num_readers=num_readers, **busy) >= 30


def test_with_less_time_than_a_few_pulls_need_there_is_one_at_a_time():
    """A link that can carry only 1.5 pulls while a version is kept: four at a time would never end."""
    assert finished(PullQueue(4), num_readers=8, num_chunks=100, chunks_per_version=50, keep=3, versions=80) >= 25
