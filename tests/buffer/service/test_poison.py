"""Groups on which the learner failed twice are set aside; every other end of a learner costs no group."""

from typing import Any

import pytest

from buffer.transport import messages
from tests.buffer.service.test_service import ACTOR, LEARNER, Buffer, credit, start  # noqa: F401


def begin(buffer: Buffer, names: list[str] | None = None, failure_id: str = "") -> list[str]:
    """A learner starts at version 0 and asks for its batch. Returns the batch's groups."""
    hello = (
        messages.LearnerHello(0, 0, tuple(names), "IndexError: 9", failure_id) if names else messages.LearnerHello(0)
    )
    assert isinstance(buffer.ask(LEARNER, hello), messages.LearnerWelcome)
    return [group.header.group_id for group in buffer.ask(LEARNER, messages.BatchRequest(0, 0, 1)).groups]


@pytest.fixture
def buffer(start: Any) -> Buffer:  # noqa: F811
    started: Buffer = start(max_staleness=2)
    started.deliver(started.ask(ACTOR, credit(num_groups=6)).leases)
    return started


def test_after_the_second_failure_other_groups_take_their_place(buffer: Buffer):
    names = begin(buffer)
    assert names == ["0.0", "1.0"]
    assert begin(buffer, names, "a") == names, "once may be chance"
    assert begin(buffer, names, "b") == ["2.0", "3.0"]
    status = buffer.ask(LEARNER, messages.StatusRequest())
    assert status.counts["dropped:poison"] == 2
    assert status.notes == ("2 groups were set aside, the learner failed twice on their batch: IndexError: 9",)
    buffer.reopen()
    assert buffer.service.status(0.0).notes == status.notes
    assert begin(buffer) == ["2.0", "3.0"]


def test_a_learner_that_was_killed_costs_no_group(buffer: Buffer):
    names = begin(buffer)
    for _ in range(5):
        assert begin(buffer) == names


def test_one_failure_that_is_reported_twice_counts_once(buffer: Buffer):
    names = begin(buffer)
    for _ in range(3):
        assert begin(buffer, names, "a") == names


def test_only_the_groups_of_both_failures_are_set_aside(buffer: Buffer):
    begin(buffer)
    begin(buffer, ["0.0"], "a")
    assert begin(buffer, ["0.0", "1.0", "5.0", "9.9", "x"], "b") == ["1.0", "2.0"]


def test_a_failure_elsewhere_in_between_clears_a_group(buffer: Buffer):
    begin(buffer)
    begin(buffer, ["0.0"], "a")
    begin(buffer, ["1.0"], "b")
    assert begin(buffer, ["0.0"], "c") == ["0.0", "1.0"]


def test_a_failure_at_a_version_without_a_batch_counts_nothing(buffer: Buffer):
    for failure_id in ("a", "b"):
        hello = messages.LearnerHello(0, 7, ("0.0", "1.0"), "IndexError", failure_id)
        assert isinstance(buffer.ask(LEARNER, hello), messages.LearnerWelcome)
    assert begin(buffer) == ["0.0", "1.0"]
