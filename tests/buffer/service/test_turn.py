"""One message that raises: it is refused and undone, and the others of its turn are handled."""

import sqlite3
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from buffer.ledger.audit import audit
from buffer.ledger.ledger import Ledger
from buffer.service.leases import Leases
from buffer.service.service import Service
from buffer.service.turn import PAUSE_SECONDS, Turns
from buffer.transport import messages
from buffer.transport.router import Incoming

ACTOR, OTHER, LEARNER = b"actor-0-aa", b"actor-1-bb", b"learner-cc"


class Buffer:
    def __init__(self, config: Any, make_group: Any) -> None:
        self.make_group, self.now, self.number = make_group, 0.0, 0
        self.noted: list[bytes] = []
        self.ledger = Ledger(config, 0.0)
        self.turns = Turns(config, self.ledger, lambda identity, error, now: self.noted.append(identity))

    def turn(self, *said: tuple[bytes, messages.Message, int], more_waiting: bool = False) -> dict[Any, Any]:
        incoming = [Incoming(identity, message, number) for identity, message, number in said]
        answers = self.turns.carry_out(incoming, more_waiting, self.now)
        return {(a.identity, a.request_number): a.message for a in answers}

    def delivery(self, lease: messages.Lease) -> messages.GroupDelivery:
        return messages.GroupDelivery("actor-0", self.make_group(lease.group_id, lease.prompt_id))

    def message_errors(self) -> int:
        self.turn()
        return self.ledger.file.counters().get("message_errors", 0)

    def state(self) -> Any:
        """Everything that a message may change, in the file and in memory."""
        ledger, service = self.ledger, self.turns.service
        tables = [ledger.file.rows(f"SELECT * FROM {name}") for name in ("occurrences", "meta", "uses", "payloads")]
        memory: list[Any] = [ledger.counts, ledger.leased, ledger.ready, sorted(ledger._deadlines.items()), ledger.held]
        memory += [service._batches, service._peers._peers, vars(service._progress) | {"_file": None}]
        return repr((tables, memory, sorted(service._leases._clients.items(), key=lambda item: item[0])))


@pytest.fixture
def buffer(make_config: Any, make_group: Any):
    made = Buffer(make_config(), make_group)
    made.turn((LEARNER, messages.LearnerHello(0), 1))
    yield made
    made.ledger.close()
    assert audit(made.ledger.file._path.parent).problems == ()


def credit(actor_id: str = "actor-0", num_groups: int = 2) -> messages.LeaseRequest:
    return messages.LeaseRequest(actor_id, 0, num_groups, "abc")


def raising(original: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    """The function, and an error after its work when `when` holds for its arguments."""

    def call(*arguments: Any, **named: Any) -> Any:
        result = original(*arguments, **named)
        if when(*arguments):
            raise ZeroDivisionError("poison")
        return result

    return call


def test_a_message_that_raises_is_refused_and_the_others_of_its_turn_are_handled(
    buffer: Buffer, caplog: pytest.LogCaptureFixture
):
    leases = buffer.turn((ACTOR, credit(num_groups=4), 1))[ACTOR, 1].leases
    bad = leases[1].group_id
    poisoned = raising(Ledger.deliver, lambda ledger, group, version: group.header.group_id == bad)
    with mock.patch.object(Ledger, "deliver", poisoned):
        answers = buffer.turn(*((ACTOR, buffer.delivery(lease), 2 + i) for i, lease in enumerate(leases[:3])))
    assert answers[ACTOR, 2] == messages.GroupReceipt(leases[0].group_id, "stored")
    assert answers[ACTOR, 4] == messages.GroupReceipt(leases[2].group_id, "stored")
    refused = answers[ACTOR, 3]
    assert (
        isinstance(refused, messages.Refused) and "failed to handle GroupDelivery: ZeroDivisionError" in refused.reason
    )
    assert refused.is_server_error, "its sender is not at fault, and may start again"
    assert (buffer.ledger.counts["ready"], buffer.ledger.counts["leased"]) == (2, 2)
    assert buffer.message_errors() == 1
    assert buffer.noted == [ACTOR]
    assert any(record.exc_info and "of actor-0-aa failed" in record.message for record in caplog.records)
    (note,) = buffer.turns.service.status(0.0).notes
    assert note.startswith("the buffer could not handle GroupDelivery of actor-0-aa (ZeroDivisionError)")
    assert buffer.turn((ACTOR, buffer.delivery(leases[1]), 9))[ACTOR, 9].outcome == "stored", "nothing of it was left"


@pytest.mark.parametrize(
    "said",
    [
        (LEARNER, messages.BatchRequest(0, 0, 1, epoch=1)),
        (OTHER, credit("actor-1")),
        (b"actor-0-new", credit()),
        (LEARNER, messages.LearnerHello(0)),
        (ACTOR, messages.LeaseReturn("actor-0", ("0.0",), "")),
        (LEARNER, messages.Close(epoch=1)),
        (ACTOR, messages.Heartbeat("actor", "actor-0", 1, "leases", {})),
    ],
    ids=lambda said: type(said[1]).__name__,
)
def test_nothing_of_a_message_that_raises_is_left_in_memory_or_file(buffer: Buffer, said: Any):
    leases = buffer.turn((ACTOR, credit(num_groups=4), 1))[ACTOR, 1].leases
    buffer.turn((OTHER, credit("actor-1"), 1), (ACTOR, buffer.delivery(leases[0]), 2))
    buffer.turn((LEARNER, messages.BatchRequest(0, 0, 1, epoch=1), 3))
    buffer.now += 1
    before = buffer.state()
    poisoned = raising(Service.receive, lambda service, identity, message, *_: message == said[1])
    with mock.patch.object(Service, "receive", poisoned), mock.patch.object(Leases, "heard"):
        (answer,) = buffer.turn((*said, 50)).values()
    assert isinstance(answer, messages.Refused)
    assert buffer.state() == before


def test_an_error_in_forming_a_batch_refuses_the_learner_and_grants_the_actors(buffer: Buffer):
    leases = buffer.turn((ACTOR, credit(num_groups=2), 1))[ACTOR, 1].leases
    said = [(ACTOR, buffer.delivery(lease), 2 + i) for i, lease in enumerate(leases)]
    buffer.turn(*said)
    with mock.patch.object(Service, "_cut", raising(Service._cut, lambda *_: True)):
        answers = buffer.turn((LEARNER, messages.BatchRequest(0, 0, 1, epoch=1), 7), (OTHER, credit("actor-1"), 8))
        assert isinstance(answers[LEARNER, 7], messages.Refused)
        assert len(answers[OTHER, 8].leases) == 2
        assert buffer.turn() == {}, "the refused request is not tried again"
    assert buffer.message_errors() == 1
    assert buffer.ledger.counts["ready"] == 2
    assert len(buffer.turn((LEARNER, messages.BatchRequest(0, 0, 1, epoch=1), 9))[LEARNER, 9].groups) == 2


def test_an_error_in_granting_refuses_that_actor_alone(buffer: Buffer):
    poisoned = raising(Ledger.issue, lambda ledger, holder, *_: holder.actor_id == "actor-0")
    with mock.patch.object(Ledger, "issue", poisoned):
        answers = buffer.turn((ACTOR, credit(), 1), (OTHER, credit("actor-1"), 1))
        assert isinstance(answers[ACTOR, 1], messages.Refused)
        assert [lease.group_id for lease in answers[OTHER, 1].leases] == ["0.0", "1.0"]
        assert buffer.turn() == {}
    assert buffer.message_errors() == 1


def test_an_error_in_the_end_of_leases_is_tried_again_only_after_a_while(buffer: Buffer):
    buffer.turn((ACTOR, credit(), 1))
    buffer.now += 100
    expire = mock.Mock(side_effect=ZeroDivisionError)
    with mock.patch.object(Leases, "expire", expire):
        for _ in range(20):
            assert len(buffer.turn((OTHER, messages.StatusRequest(), 1))) == 1
            buffer.now += PAUSE_SECONDS / 10
    assert expire.call_count == 2 * 2, "with the whole turn, and then alone"
    buffer.now += PAUSE_SECONDS
    assert buffer.message_errors() == 2
    assert buffer.ledger.counts["pending"] == 2


def test_an_error_of_the_file_is_not_a_message_s(buffer: Buffer):
    broken = sqlite3.OperationalError("disk I/O error")
    broken.sqlite_errorcode = sqlite3.SQLITE_IOERR_READ
    with mock.patch.object(Ledger, "deliver", side_effect=broken), pytest.raises(sqlite3.OperationalError):
        buffer.turn((ACTOR, messages.GroupDelivery("actor-0", buffer.make_group("0.0", 0)), 1))
