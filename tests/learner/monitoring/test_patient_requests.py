import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from buffer.transport.connection import RequestRefused
from buffer.transport.messages import Close, Done, Message, Status, StatusRequest, Wait
from learner.monitoring import patient_requests
from learner.monitoring.patient_requests import BatchWait, PatientRequests
from tests.learner.held_requests import Buffer
from tests.learner.samples import CPU

pytestmark = pytest.mark.usefixtures("quickly")


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_requests, "_ROUND_SECONDS", 0.01)
    monkeypatch.setattr(patient_requests, "FIRST_LINE_SECONDS", 0.05)
    monkeypatch.setattr(patient_requests, "STATUS_SECONDS", 0.0)
    monkeypatch.setattr(patient_requests, "STOPPING_SECONDS", 0.1)


class Asker:
    """A rank with requests; `on_beat` is called with every heartbeat that shows a wait."""

    def __init__(self) -> None:
        self.buffer, self.stopping, self.beats = Buffer(), threading.Event(), list[str]()
        self.on_beat: Callable[[], object] = lambda: None
        self.requests = PatientRequests(self.buffer, self._beat, self.stopping, CPU)  # type: ignore[arg-type]

    def _beat(self, waiting_for: str) -> None:
        self.beats.append(waiting_for)
        if waiting_for:
            self.on_beat()

    def asked(self) -> Future[Message]:
        """The last request, without the questions how the buffer is."""
        return next(f for message, f in reversed(self.buffer.asked) if not isinstance(message, StatusRequest))

    def answer(self, outcome: Message | Exception) -> None:
        future = self.asked()
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage().partition(" (")[0].partition(":")[0] for record in caplog.records]


@pytest.mark.usefixtures("one_rank")
def test_a_wait_is_shown_at_growing_intervals_and_ends_with_the_answer(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    asker = Asker()
    asker.on_beat = lambda: asker.answer(Done()) if len(caplog.records) == 4 else None
    assert asker.requests.ask_together(Close(), "the buffer to end the run") == Done()
    assert lines(caplog) == ["waits for the buffer to end the run"] * 4 + ["waited for the buffer to end the run"]
    # Each line comes after about twice the time, so there are more rounds between two lines than lines.
    assert len(asker.beats) > 8 and set(asker.beats[:-1]) == {"the buffer to end the run"}
    assert asker.beats[-1] == "", "the work goes on"


@pytest.mark.usefixtures("one_rank")
def test_an_answer_that_comes_soon_is_not_spoken_of(caplog: pytest.LogCaptureFixture):
    asker = Asker()
    request = asker.buffer.request

    def answered(message: Message, timeout_seconds: float) -> Future[Message]:
        future = request(message, timeout_seconds)
        future.set_result(Done())
        return future

    asker.buffer.request = answered  # type: ignore[method-assign]
    asker.stopping.set()
    assert asker.requests.ask_together(Close(), "the end") == Done()
    assert (caplog.records, asker.beats) == ([], [])


@pytest.mark.usefixtures("one_rank")
def test_a_refusal_is_raised():
    asker = Asker()
    asker.on_beat = lambda: asker.answer(RequestRefused("never"))
    with pytest.raises(RequestRefused, match="never"):
        asker.requests.ask(Close(), "the end")


@pytest.mark.usefixtures("one_rank")
def test_a_learner_that_is_told_to_end_waits_only_a_little_longer(caplog: pytest.LogCaptureFixture):
    asker = Asker()
    asker.on_beat = asker.stopping.set
    assert asker.requests.ask(Close(), "the end") is None
    assert asker.asked().cancelled(), "or the connection would repeat the request for ever"
    assert lines(caplog)[-1] == "no longer waits for the end"
    # The time is for all requests together.
    assert asker.requests.ask(Close(), "the next") is None
    assert "the next" not in asker.beats


@pytest.mark.usefixtures("one_rank")
def test_for_the_last_checkpoint_a_full_buffer_is_waited_for_and_the_reason_is_said():
    asker, began = Asker(), time.monotonic()
    request = asker.buffer.request

    def says_how_it_is(message: Message, timeout_seconds: float) -> Future[Message]:
        future = request(message, timeout_seconds)
        if isinstance(message, StatusRequest):
            future.set_result(status(Wait("buffer", "space on the ledger's disk", 3.0)))
        return future

    asker.buffer.request = says_how_it_is  # type: ignore[method-assign]
    asker.stopping.set()
    # Much longer than a learner waits that is told to end.
    asker.on_beat = lambda: asker.answer(Done()) if time.monotonic() - began > 1.0 else None
    assert asker.requests.ask_together(Close(), "the buffer", until_gone=True) == Done()
    assert "the buffer, which waits for space on the ledger's disk" in asker.beats


@pytest.mark.usefixtures("one_rank")
def test_for_the_last_checkpoint_a_buffer_that_is_gone_is_not_waited_for(caplog: pytest.LogCaptureFixture):
    asker = Asker()
    asker.stopping.set()
    assert asker.requests.ask_together(Close(), "the buffer", until_gone=True) is None
    assert any(line.startswith("the buffer is gone") for line in lines(caplog))


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Calls a function on two ranks, which are threads. Returns what each returned or raised."""
    ranks, meeting, given = threading.local(), threading.Barrier(2, timeout=60), [0, 0]

    def all_reduce_max(values: torch.Tensor) -> torch.Tensor:
        given[ranks.rank] = int(values[0])
        meeting.wait()
        largest = max(given)
        meeting.wait()
        return torch.tensor([largest])

    monkeypatch.setattr(patient_requests, "all_reduce_max", all_reduce_max)
    monkeypatch.setattr(patient_requests, "rank_and_world_size", lambda: (ranks.rank, 2))

    def run(function: Callable[[int], Any]) -> list[Any]:
        def on_rank(rank: int) -> Any:
            ranks.rank = rank
            try:
                return function(rank)
            except Exception as error:
                return error

        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(on_rank, (0, 1)))

    return run


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [(Done(), (Done, Close)), (RequestRefused("never"), (RequestRefused, ConnectionError)), (None, (None, None))],
    ids=["answered", "refused", "told to end"],
)
def test_all_ranks_wait_for_the_answer_to_the_first(
    two_ranks: Callable[..., list[Any]], outcome: Message | Exception | None, expected: tuple[Any, Any]
):
    askers = [Asker(), Asker()]

    def end_the_wait() -> None:
        if outcome is None:
            askers[0].stopping.set()
        elif askers[1].beats and not askers[0].asked().done():
            askers[0].answer(outcome)

    askers[0].on_beat = end_the_wait
    found = two_ranks(lambda rank: askers[rank].requests.ask_together(Close(), "the end"))
    assert [None if one is None else type(one) for one in found] == list(expected)
    assert askers[1].buffer.asked == [] and askers[1].beats != []


def status(*waits: Wait) -> Status:
    return Status({}, 0, False, (), (), waits)


def test_the_wait_for_a_batch_says_when_it_is_the_buffer_that_is_waited_for(caplog: pytest.LogCaptureFixture):
    buffer = Buffer()
    shown = BatchWait(buffer)  # type: ignore[arg-type]
    full = status(Wait("actor-0", "leases", 9.0), Wait("buffer", "space on the ledger's disk", 3.0))
    for answer in (full, None, full, status()):
        # The buffer has no space, then does not answer at all; in the end only groups are missing.
        for _ in range(30):
            shown.go_on()
            threading.Event().wait(0.01)
            if answer is not None and buffer.asked and not buffer.asked[-1][1].done():
                buffer.asked[-1][1].set_result(answer)
    assert "waits for space on the ledger's disk" in lines(caplog)
    assert "waited for space on the ledger's disk" in lines(caplog)
    assert {type(message) for message, _ in buffer.asked} == {StatusRequest}
