import logging
import time

import pytest

from buffer.transport.messages import (
    BatchRequest,
    GroupRequest,
    NoMoreBatches,
    Shard,
    ShardGroup,
)
from buffer.transport.packed_group import BYTES_PER_TOKEN, pack_group
from learner.batches.prefetch import Prefetch, Received
from tests.learner.held_requests import Buffer
from tests.learner.samples import CPU, make_batch, make_group


@pytest.fixture
def buffer() -> Buffer:
    return Buffer()


@pytest.fixture
def prefetch(buffer: Buffer):
    made = Prefetch(buffer, 1, 2, CPU, 64.0)
    yield made
    made.close()


def test_a_batch_is_asked_for_once_and_comes_flattened(buffer: Buffer, prefetch: Prefetch):
    first = prefetch.ask(3)
    assert prefetch.ask(3) is first and not first.done()
    ((request, answer),) = buffer.asked
    assert request == BatchRequest(3, 1, 2, 64.0)
    groups = [make_group("7.0", 0), make_group("8.0", 1)]
    answer.set_result(Shard(3, 4, (3, 2), tuple(pack_group(group) for group in groups)))
    received = first.result(10)
    assert isinstance(received, Received)
    assert received.occurrences == "7-8" and received.shard.num_groups_in_batch == 4
    expected = make_batch(groups, 3)
    assert received.batch.policy_version == 3 and received.batch.staleness == (3, 2)
    assert received.batch.behavior_logprobs.equal(expected.behavior_logprobs)
    prefetch.ask(4)
    assert [asked.policy_version for asked, _ in buffer.asked] == [3, 4]


def test_a_refusal_and_the_end_of_the_prompts_reach_who_waits(buffer: Buffer, prefetch: Prefetch):
    failed, ended = prefetch.ask(0), prefetch.ask(1)
    buffer.asked[0][1].set_exception(TimeoutError("no answer"))
    buffer.asked[1][1].set_result(NoMoreBatches("all the same"))
    with pytest.raises(TimeoutError, match="no answer"):
        failed.result(10)
    assert ended.result(10) == NoMoreBatches("all the same")


def test_an_answer_after_the_end_is_forgotten(buffer: Buffer, prefetch: Prefetch, caplog: pytest.LogCaptureFixture):
    coming = prefetch.ask(0)
    prefetch.close()
    with caplog.at_level(logging.ERROR):
        buffer.asked[0][1].set_exception(ConnectionError("closed"))
    assert not coming.done() and not caplog.records


def test_large_groups_are_fetched_one_by_one_within_a_window(
    buffer: Buffer, prefetch: Prefetch, monkeypatch: pytest.MonkeyPatch
):
    groups = [make_group(f"{number}.0", number) for number in range(6)]
    packed = [pack_group(group) for group in groups]
    num_tokens = [sum(group.header.num_tokens) for group in packed]
    monkeypatch.setattr("learner.batches.prefetch.WINDOW_BYTES", 2 * max(num_tokens) * BYTES_PER_TOKEN)
    coming = prefetch.ask(3)
    rest = tuple((number, num_tokens[number]) for number in range(1, 6))
    buffer.asked[0][1].set_result(Shard(3, 6, (0, 1, 2, 3, 2, 1), (packed[0],), rest))
    most = 0
    for _ in range(10_000):
        waiting = [(message, answer) for message, answer in buffer.asked if not answer.done()]
        most = max(most, len(waiting))
        # Answers may overtake each other.
        for message, answer in reversed(waiting):
            assert isinstance(message, GroupRequest)
            answer.set_result(ShardGroup(packed[message.occurrence]))
        if coming.done():
            break
        time.sleep(0.001)
    assert most <= 2
    received = coming.result(10)
    assert isinstance(received, Received)
    assert received.shard == Shard(3, 6, (0, 1, 2, 3, 2, 1), tuple(packed))
    assert received.batch.behavior_logprobs.equal(make_batch(groups, 3).behavior_logprobs)
