import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from buffer.trajectory import TrajectoryGroup, VersionSpan
from buffer.transport.messages import ActorTotals, LearnerHello, LearnerWelcome, Message, Status, StatusRequest
from learner.batches.batch import TrainingBatch
from learner.monitoring.logprob_check import LogprobCheck, LogprobMismatchError, OlderGroups, say_hello
from tests.learner.samples import CPU, make_batch, make_group

pytestmark = pytest.mark.usefixtures("one_rank")

TOLERANCE = 0.02


def batch(version: int, *, spans: tuple[int, int] | None = None) -> TrainingBatch:
    """Two groups sampled under `version` alone; with `spans` every trajectory has tokens of these two versions."""
    groups = [make_group(f"g{i}", i, version=version) for i in range(2)]
    if spans is not None:
        versions = (VersionSpan(0, spans[0]), VersionSpan(4, spans[1]))
        groups = [
            TrajectoryGroup(
                g.group_id, g.prompt_id, tuple(replace(t, policy_versions=versions) for t in g.trajectories)
            )
            for g in groups
        ]
    return make_batch(groups, version)


def shifted(made: TrainingBatch, by: float) -> Tensor:
    return made.behavior_logprobs - by


def test_a_fresh_learner_refuses_what_disagrees_and_names_the_difference():
    check, made = LogprobCheck(TOLERANCE, OlderGroups()), batch(0)
    with pytest.raises(
        LogprobMismatchError, match=r"policy 0: .* by 0\.5000 on average and by 0\.5000 at most over \d+"
    ):
        check.compare(made, shifted(made, 0.5))
    assert not check.agreed


def test_log_probabilities_that_are_no_numbers_disagree():
    made = batch(0)
    with pytest.raises(LogprobMismatchError, match="by nan on average"):
        LogprobCheck(TOLERANCE, OlderGroups()).compare(made, torch.full_like(made.behavior_logprobs, torch.nan))


@pytest.mark.parametrize("made", [batch(3, spans=(2, 3)), replace(batch(3), policy_version=4)], ids=["span", "older"])
def test_tokens_of_other_weights_say_nothing(made: TrainingBatch):
    check = LogprobCheck(TOLERANCE, OlderGroups())
    check.compare(made, shifted(made, 9.0))
    assert not check.agreed
    check.compare(batch(5), shifted(batch(5), 0.01))
    assert check.agreed


@pytest.mark.parametrize(
    ("made", "can_tell"),
    [(batch(3), True), (replace(batch(3), policy_version=4), False), (batch(4, spans=(3, 4)), False)],
    ids=["its own version", "older", "span"],
)
def test_what_can_tell_is_known_without_a_forward_pass(made: TrainingBatch, can_tell: bool):
    assert LogprobCheck(TOLERANCE, OlderGroups()).can_tell(made) is can_tell


def test_a_batch_that_is_passed_over_counts_as_arrived():
    check = LogprobCheck(TOLERANCE, OlderGroups(4))
    check.pass_over(batch(3))
    check.compare(batch(3), shifted(batch(3), 0.5))
    with pytest.raises(LogprobMismatchError):
        check.compare(batch(3), shifted(batch(3), 0.5))


@pytest.mark.parametrize(("newest_version", "may_be"), [(-1, False), (5, False), (6, True)])
def test_weights_of_an_earlier_learner_are_known_by_their_version_alone(newest_version: int, may_be: bool):
    assert LogprobCheck(TOLERANCE, OlderGroups(99, newest_version)).may_be_older(6) is may_be


def test_a_learner_that_returned_only_reports_while_older_groups_may_come(caplog: pytest.LogCaptureFixture):
    """Four groups were leased, and an actor had version 6 from before: the first batch that must agree is that of 7."""
    check = LogprobCheck(TOLERANCE, OlderGroups(4, newest_version=6))
    for version in (5, 6):
        check.compare(batch(version), shifted(batch(version), 0.5))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2 and not check.agreed
    with pytest.raises(LogprobMismatchError, match="policy 7"):
        check.compare(batch(7), shifted(batch(7), 0.5))


@pytest.mark.parametrize(
    ("number", "newest_version", "num_used", "version", "may_come"),
    [(0, -1, 0, 0, False), (1, -1, 0, 9, True), (8, -1, 8, 9, False), (0, 3, 0, 3, True), (0, 3, 0, 4, False)],
)
def test_older_groups_are_counted_and_dated(
    number: int, newest_version: int, num_used: int, version: int, may_come: bool
):
    older = OlderGroups(number, newest_version)
    older.use(num_used)
    assert older.may_come(version) is may_come


class Buffer:
    """Answers as the buffer does."""

    def __init__(self, issued: int, policy_version: int, actor_version: int, outstanding: int) -> None:
        actors = ActorTotals(1, newest_version=actor_version)
        self.status = Status({"issued": issued}, policy_version, False, (), (), actors=actors)
        self.outstanding = outstanding
        self.heard: list[Message] = []
        self.epoch = 0

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def ask_together(self, message: Message, waiting_for: str) -> Message | None:
        self.heard.append(message)
        return LearnerWelcome(0, self.outstanding, 7) if isinstance(message, LearnerHello) else self.status


@pytest.mark.parametrize(
    ("buffer", "last_tolerated"),
    [(Buffer(0, 0, -1, 0), -1), (Buffer(9, 4, 2, 0), 6), (Buffer(9, 4, 8, 0), 10)],
    ids=["fresh", "the learner was ahead", "an actor is ahead"],
)
def test_the_hello_finds_out_what_is_older(buffer: Buffer, last_tolerated: int):
    older = say_hello(buffer, 3, 2, CPU)  # type: ignore[arg-type]
    # The status is requested before the hello, because the hello moves the buffer's version back.
    assert buffer.heard == [StatusRequest(), LearnerHello(3, after_epoch=0)]
    assert buffer.epoch == 7, "all later messages carry it"
    assert [version for version in range(20) if older.may_come(version)] == list(range(last_tolerated + 1))


def test_a_hello_that_comes_after_another_learners_is_said_again():
    class Overtaken(Buffer):
        def ask_together(self, message: Message, waiting_for: str) -> Message | None:
            answer = super().ask_together(message, waiting_for)
            if len(self.heard) == 1:
                self.status = replace(self.status, epoch=4)
            return LearnerWelcome(0, 0, 0) if len(self.heard) == 2 else answer

    buffer = Overtaken(9, 4, 4, 5)
    assert say_hello(buffer, 3, 1, CPU) is not None  # type: ignore[arg-type]
    hellos = [message for message in buffer.heard if isinstance(message, LearnerHello)]
    assert hellos == [LearnerHello(3, after_epoch=0), LearnerHello(3, after_epoch=4)]
    assert buffer.epoch == 7


def test_groups_that_are_out_are_older_whatever_their_version():
    older = say_hello(Buffer(9, 4, 4, 5), 3, 1, CPU)  # type: ignore[arg-type]
    assert older.may_come(99)
    older.use(5)
    assert not older.may_come(99)
