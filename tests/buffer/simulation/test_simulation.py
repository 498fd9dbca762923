"""The whole protocol under faults, in virtual time: many seeds, every kind of fault, and defects that must be found."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from actors.rollouts.deadlines import GroupDeadlines
from buffer.ledger.ledger import Ledger
from buffer.service.leases import Leases
from buffer.service.service import Service
from buffer.service.turn import Turns
from buffer.transport import messages
from buffer.transport.packed_group import PackedGroup
from tests.buffer.simulation.faults import KINDS
from tests.buffer.simulation.network import Client
from tests.buffer.simulation.simulation import Simulation, SimulationError, simulate

CHUNKS, SEEDS_PER_CHUNK = 20, 10


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The log of thousands of virtual seconds would be kept by pytest."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_no_seed_breaks_a_promise(chunk: int):
    for seed in range(chunk * SEEDS_PER_CHUNK, (chunk + 1) * SEEDS_PER_CHUNK):
        simulate(seed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_fault_happens_and_is_survived(kind: str):
    happened = 0
    for seed in range(1_000, 1_020):
        happened += simulate(seed, kinds=(kind,)).faults[kind]
        if happened > 3:
            return
    raise AssertionError(f"{kind}: only {happened} times")


def test_without_faults_every_actor_contributes():
    for seed in range(1_000, 1_010):
        simulate(seed, kinds=("none",))


def test_a_seed_reproduces_every_event(monkeypatch: pytest.MonkeyPatch):
    lines: list[list[str]] = []
    original = Simulation.close

    def close(simulation: Simulation) -> None:
        lines.append(list(simulation.world.trace))
        original(simulation)

    monkeypatch.setattr(Simulation, "close", close)
    first, second = simulate(7), simulate(7)
    assert first == second
    assert lines[0] == lines[1] != []


# The simulation can fail: known defects, put back by a change of one function, are found.


def found(kinds: tuple[str, ...], num_seeds: int = 60) -> str:
    """The first broken promise within some seeds; empty: none."""
    for seed in range(2_000, 2_000 + num_seeds):
        try:
            simulate(seed, kinds=kinds)
        except SimulationError as error:
            return str(error).partition("\n")[0]
    return ""


def test_leases_that_never_expire_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Leases, "expire", lambda *_: None)
    assert "leased to" in found(("actor gone",))


def test_rollouts_that_never_end_are_found(monkeypatch: pytest.MonkeyPatch):
    """Without deadlines a stuck rollout keeps its lease, and the learner waits for it."""
    monkeypatch.setattr(GroupDeadlines, "check", lambda _: None)
    assert "after the last fault the learner is at version" in found(("actor killed",))


def test_leases_without_admission_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Leases, "_admissible", lambda *_: 4)
    assert "staleness" in found(("learner frozen",))


def test_an_inventory_that_is_ignored_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Ledger, "release_unheld", lambda *_: 0)
    monkeypatch.setattr(Client, "_hand_over", lambda *_: None)
    assert "leased to" in found(("actor frozen",))


def test_two_processes_that_steal_from_each_other_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Leases, "is_replaced", lambda *_: False)
    assert "live on" in found(("actor twice",))


def test_deliveries_that_are_stored_twice_are_found(monkeypatch: pytest.MonkeyPatch):
    """A repeated delivery of a used group makes the group ready again."""
    original = Ledger.deliver

    def deliver(ledger: Ledger, group: PackedGroup, next_version: int) -> str:
        outcome = original(ledger, group, next_version)
        if outcome == "duplicate":
            occurrence = int(group.header.group_id.partition(".")[0])
            sql = "UPDATE occurrences SET state = 'ready' WHERE occurrence = ? AND state = 'used'"
            if ledger.file.write(sql, occurrence):
                ledger.file.write("DELETE FROM uses WHERE occurrence = ?", occurrence)
                ledger._move("used", "ready")
                ledger.ready[group.header.oldest_version] += 1
                ledger.batches.load()
        return outcome

    monkeypatch.setattr(Ledger, "deliver", deliver)
    assert found(("actor cut off", "actor frozen"))


def test_a_rollback_that_forgets_batches_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Ledger, "roll_back", lambda *_: 0)
    assert found(("learner killed",))


def test_receipts_before_the_commit_are_found(monkeypatch: pytest.MonkeyPatch):
    """The answers leave, and then the transaction is undone."""
    original = Turns._together

    def together(turns: Turns, *arguments: Any) -> Any:
        receive = turns.service.receive

        def eager(*message: Any) -> Any:
            for answer in receive(*message):
                router.send(answer.identity, answer.message, answer.request_number)
            return []

        router = turns._note.__self__  # type: ignore[attr-defined]
        turns.service.receive = eager  # type: ignore[method-assign]
        try:
            return original(turns, *arguments)
        finally:
            del turns.service.receive

    monkeypatch.setattr(Turns, "_together", together)
    assert found(("buffer killed",))


def test_checkpoints_that_are_named_before_the_ledger_is_on_the_disk_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Service, "_begin_checkpoint", lambda *_: messages.Done())
    assert found(("power cut",))


def test_late_hellos_of_dead_learners_are_found(monkeypatch: pytest.MonkeyPatch):
    original = Service._learner_hello

    def learner_hello(service: Service, identity: bytes, hello: messages.LearnerHello, number: int) -> messages.Message:
        return original(service, identity, replace(hello, after_epoch=-1), number)

    monkeypatch.setattr(Service, "_learner_hello", learner_hello)
    assert found(("learner overtaken",))
