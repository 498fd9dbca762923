"""Inventory and incarnations: leases that their holders do not know of, and two processes of one name."""

from typing import Any

import pytest

from buffer.service import incarnations
from buffer.service.leases import PRESUMED_DEAD_SECONDS
from buffer.service.peers import WORST
from buffer.transport import messages
from tests.buffer.service.test_service import ACTOR, LEARNER, OTHER, Buffer, credit, ids, report, run_to, start

__all__ = ["start"]

ELDER, YOUNGER = b"actor-0-aa", b"actor-0-bb"


def beat(held: tuple[str, ...] = (), name: str = "actor-0") -> messages.Heartbeat:
    return messages.Heartbeat("actor", name, 0, "", {}, held)


# Inventory.


def test_a_lease_that_its_holder_never_heard_of_does_not_stop_the_run(start: Any):
    """A frozen actor's request is answered, expires, is repeated on thaw and answered again; it takes the first one."""
    buffer = start()
    first = buffer.tell(ACTOR, credit(held=()), 1)[ACTOR, 1]
    buffer.wait(buffer.config.lease_seconds + 1)
    unheard = buffer.tell(ACTOR, credit(held=()), 1)[ACTOR, 1]
    assert ids(unheard) == ["0.1", "1.1", "2.1", "3.1"]
    told = buffer.ask(ACTOR, beat(tuple(ids(first))))
    assert told.ended == tuple(ids(first)), "the actor stops them"
    assert buffer.ledger.counts["leased"] == 4, "a heartbeat ends nothing: an answer may be on its way"
    again = buffer.tell(ACTOR, credit(held=()), 2)[ACTOR, 2]
    assert ids(again) == ["0.2", "1.2", "2.2", "3.2"]
    assert buffer.service.status(0).counts["unheld"] == 4
    buffer.deliver(again.leases[:2])
    assert len(buffer.ask(LEARNER, messages.BatchRequest(0, 0, 1)).groups) == 2


def test_a_new_request_ends_what_is_not_held_and_nothing_else(start: Any):
    buffer = start(groups_per_batch=4)
    first = ids(buffer.tell(ACTOR, credit(num_groups=3, held=()), 1)[ACTOR, 1])
    others = ids(buffer.tell(OTHER, credit(num_groups=1, actor_id="actor-1", held=()), 1)[OTHER, 1])
    second = ids(buffer.tell(ACTOR, credit(num_groups=1, held=tuple(first[:2])), 2)[ACTOR, 2])
    assert second == ["2.1"], "the one that is not held is leased again"
    assert buffer.ledger.not_leased("actor-0-aa", first) == (first[2],)
    assert buffer.ledger.not_leased("actor-1-bb", others) == ()


@pytest.mark.parametrize("restarts", [False, True])
def test_an_answer_on_its_way_is_not_ended_by_its_own_request(start: Any, restarts: bool):
    buffer = start()
    granted = buffer.tell(ACTOR, credit(num_groups=2, held=()), 7)[ACTOR, 7]
    if restarts:
        buffer.reopen()
    assert buffer.tell(ACTOR, credit(num_groups=2, held=()), 7)[ACTOR, 7] == granted
    buffer.ask(ACTOR, beat())
    assert buffer.ledger.counts["leased"] == 2


@pytest.mark.parametrize("restarts", [False, True])
def test_a_late_copy_of_an_older_request_changes_nothing(start: Any, restarts: bool):
    buffer = start()
    first = ids(buffer.tell(ACTOR, credit(num_groups=1, held=()), 1)[ACTOR, 1])
    second = ids(buffer.tell(ACTOR, credit(num_groups=1, held=tuple(first)), 2)[ACTOR, 2])
    if restarts:
        buffer.reopen()
    assert ids(buffer.tell(ACTOR, credit(num_groups=1, held=()), 1)[ACTOR, 1]) == first
    assert buffer.ledger.not_leased("actor-0-aa", first + second) == ()
    assert buffer.ledger.counts["leased"] == 2


def test_leases_that_have_ended_are_not_granted_again_to_the_same_request(start: Any):
    buffer = start()
    granted = buffer.tell(ACTOR, credit(held=()), 1)[ACTOR, 1]
    buffer.ask(OTHER, messages.LeaseReturn("actor-1", tuple(ids(granted)), "no longer mine"))
    assert buffer.ledger.counts["leased"] == len(ids(granted)), "an actor gives back only what it has"
    buffer.ask(ACTOR, messages.LeaseReturn("actor-0", tuple(ids(granted)[:1]), ""))
    assert ids(buffer.tell(ACTOR, credit(held=()), 1)[ACTOR, 1]) == ids(granted)[1:]
    # Exactly at the deadline the leases end, and the connection is still known.
    buffer.wait(buffer.config.lease_seconds)
    assert buffer.tell(ACTOR, credit(held=()), 1)[ACTOR, 1].leases == ()


def test_an_evaluation_that_its_holder_does_not_have_goes_to_another_actor(start: Any):
    buffer = start()
    buffer.ask(LEARNER, messages.EvaluationRequest(0))
    assert buffer.tell(ACTOR, credit(held=()), 1)[ACTOR, 1].evaluate_version == 0
    assert buffer.tell(OTHER, credit(num_groups=0, actor_id="actor-1"), 1) == {}
    held = tuple(buffer.granted[ACTOR][0])
    running = messages.LeaseRequest("actor-0", 0, 0, "abc", held, (0,))
    assert buffer.tell(ACTOR, running, 2) == {}
    assert buffer.tell(ACTOR, credit(num_groups=0, held=held), 3)[OTHER, 1].evaluate_version == 0


def test_a_heartbeat_ends_an_evaluation_whose_report_the_ledger_lost(start: Any):
    """As after a power cut, while the request that still names the evaluation is parked."""
    buffer = start()
    buffer.ask(LEARNER, messages.EvaluationRequest(0))
    first = buffer.tell(ACTOR, credit(held=()), 1)[ACTOR, 1]
    assert first.evaluate_version == 0
    held = tuple(ids(first))

    def says(number: int, *evaluating: int) -> dict[Any, Any]:
        return buffer.tell(ACTOR, messages.Heartbeat("actor", "actor-0", 0, "", {}, held, evaluating), number)

    assert says(2)
    assert buffer.ledger.evaluations.holders() == {"actor-0-aa"}, "the answer to request 1 may be on its way"
    assert buffer.tell(ACTOR, messages.LeaseRequest("actor-0", 0, 1, "abc", held, (0,)), 3) == {}
    assert buffer.tell(OTHER, credit(num_groups=0, actor_id="actor-1"), 1) == {}
    assert (OTHER, 1) not in says(2), "sent before the parked request, and late"
    assert (OTHER, 1) not in says(4, 0)
    answers = says(5)
    assert [answers[key].evaluate_version for key in answers if key in ((ACTOR, 3), (OTHER, 1))] == [0]


# Incarnations.


def test_a_process_that_goes_on_under_another_name_leaves_its_name_to_the_older_one(start: Any):
    buffer = start()
    for identity, name in ((b"old-aa", "actor-0"), (b"new-bb", "actor-0"), (b"new-bb", "actor-1")):
        buffer.ask(identity, messages.Heartbeat("actor", name, 0, "", {}))
    buffer.ask(b"old-aa", messages.Heartbeat("actor", "actor-0", 0, "", {}))
    assert buffer.tell(b"old-aa", credit(held=()), 9)[b"old-aa", 9].leases


def test_of_two_processes_of_one_name_the_newest_works_and_the_older_is_told_why(start: Any):
    """However they alternate: nothing that the newest one samples is lost to the other one."""
    buffer = start(groups_per_batch=4)
    buffer.ask(ELDER, credit(num_groups=2))
    for round_ in range(4):
        granted = buffer.ask(YOUNGER, credit(num_groups=2))
        for message in (credit(num_groups=2), beat(), messages.LeaseReturn("actor-0", tuple(ids(granted)), "")):
            refused = buffer.ask(ELDER, message)
            why = "another process took the name actor-0 over; give this one another --name"
            assert refused == messages.Refused(why, is_replaced=True)
        if round_ == 1:
            buffer.reopen()
        if round_ == 2:
            buffer.wait(2 * buffer.config.lease_seconds)
            granted = buffer.ask(YOUNGER, credit(num_groups=2))
        lease = granted.leases[0]
        elders = messages.GroupDelivery("actor-0", buffer.make_group(lease.group_id, lease.prompt_id))
        assert isinstance(buffer.ask(ELDER, elders), messages.Refused)
        assert buffer.deliver(granted.leases, actor=YOUNGER) == ["stored"] * len(granted.leases)
    counts = buffer.service.status(buffer.now).counts
    assert (counts["ready"], counts.get("late", 0)) == (8, 0)


@pytest.mark.parametrize("role", ["learner", "observer"])
def test_only_the_key_of_actors_takes_a_name_over(start: Any, role: str):
    buffer = start()
    buffer.ask(ELDER, beat())
    for number, message in enumerate((beat(), credit(held=()))):
        with buffer.ledger.transaction():
            [answer] = buffer.service.receive(YOUNGER, message, number, buffer.now, role)
        assert isinstance(answer.message, messages.Refused) and not answer.message.is_replaced
    assert isinstance(buffer.ask(ELDER, beat()), messages.HeartbeatReply)


def test_a_process_takes_over_with_its_first_heartbeat(start: Any):
    buffer = start()
    assert len(buffer.ask(ELDER, credit()).leases) == 4
    buffer.tell(OTHER, credit(num_groups=4, actor_id="actor-1"), 1)
    buffer.number += 1
    answers = buffer.tell(YOUNGER, beat(), buffer.number)
    assert len(answers[OTHER, 1].leases) == 4, "what its predecessor had goes on at once"


def test_what_is_remembered_of_names_is_bounded(start: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(incarnations, "MOST_REMEMBERED", 5)
    buffer = start()
    for number in range(20):
        buffer.ask(b"actor-%d-aa" % number, beat(name=f"actor-{number}"))
    assert len(buffer.ledger.file.rows("SELECT * FROM incarnations")) == 5
    assert isinstance(buffer.ask(b"actor-0-aa", beat()), messages.HeartbeatReply), "it lives on under its name"
    assert isinstance(buffer.ask(b"actor-19-bb", beat(name="actor-19")), messages.HeartbeatReply)
    buffer.reopen()
    assert isinstance(buffer.ask(b"actor-19-aa", beat(name="actor-19")), messages.Refused)


# Many actors.


def test_evaluations_go_round(start: Any):
    buffer, evaluated = start(num_prompts=40), []
    run_to(buffer, 6)
    for version in range(6):
        for number in range(3):
            name = f"worker-{number}"
            buffer.tell(name.encode(), messages.LeaseRequest(name, 6, 0, "abc"), version)
        buffer.number += 1
        answers = buffer.tell(LEARNER, messages.EvaluationRequest(version), buffer.number)
        evaluated += [identity for (identity, _), answer in answers.items() if answer != messages.Done()]
        assert answers[evaluated[-1], version].evaluate_version == version
        buffer.ask(evaluated[-1], report(6, version))
    assert evaluated == [b"worker-0", b"worker-1", b"worker-2"] * 2


def crowd(buffer: Buffer, size: int) -> None:
    """Actors that wait: the first one has all places."""
    for number in range(size):
        name = f"actor-{number}"
        buffer.tell(name.encode(), messages.LeaseRequest(name, 0, 64, "abc"), 1)


@pytest.mark.parametrize("for_what", ["room", "a turn"])
def test_an_idle_turn_does_not_look_at_those_who_wait(start: Any, for_what: str):
    """Counted, not timed: queries and looks at clients of a turn in which nothing happens, with few and with many."""
    work = []
    for size in (3, 300):
        buffer = start(groups_per_batch=1_000 if for_what == "a turn" else 2, num_prompts=2_000)
        if for_what == "a turn":
            places = buffer.service._leases.places
            places.patience = 1e9
            places._quotas = {b"actor-%d" % number: (0.0, 0) for number in range(size)}
        crowd(buffer, size)
        waiting = buffer.service._leases._waiting
        assert sum(len(waiting.with_version(version)) for version in waiting.versions()) >= size - 1
        queries: list[str] = []
        buffer.ledger.file._db.set_trace_callback(queries.append)
        looked_at: list[bytes] = []
        first = buffer.service._leases._waiting.first

        def look(version: int, first: Any = first, looked_at: list[bytes] = looked_at) -> Any:
            head = first(version)
            looked_at.append(head)
            return head

        buffer.service._leases._waiting.first = look
        buffer.wait(0.1)
        buffer.ledger.file._db.set_trace_callback(None)
        work.append((len(queries), len(looked_at)))
        buffer.ledger.close()
        buffer.ledger.close = lambda: None
    assert work[0] == work[1]
    assert work[1][0] <= 4


def test_the_longest_waits_are_shown(start: Any):
    buffer = start()
    for number in range(2 * WORST):
        buffer.now = number / 100
        name = f"actor-{number}"
        buffer.tell(name.encode(), messages.LeaseRequest(name, 0, 64, "abc"), 1)
    waits = buffer.service.waits(buffer.now)
    assert [wait.who for wait in waits] == [f"actor-{number}" for number in range(1, WORST + 1)]


def test_who_is_silent_waits_in_no_ones_way_and_waits_on_when_heard(start: Any):
    buffer = start()
    crowd(buffer, 4)
    buffer.now += PRESUMED_DEAD_SECONDS + 1
    buffer.ask(b"actor-0", beat(tuple(buffer.granted[b"actor-0"][0])))
    buffer.wait(0.1)
    assert buffer.service._leases.places.share(b"actor-0") == 4, "the only one that lives"
    answers = buffer.tell(b"actor-2", beat(name="actor-2"), 5)
    assert set(answers) == {(b"actor-2", 5)}
    held = tuple(buffer.granted[b"actor-0"][0])
    buffer.number += 1
    answers = buffer.tell(b"actor-0", messages.LeaseReturn("actor-0", held, ""), buffer.number)
    assert answers[b"actor-2", 1].leases, "it waits on with its old request"
    assert (b"actor-1", 1) not in answers
