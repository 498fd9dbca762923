"""The end of a run waits for the last evaluation as long as an actor is at it."""

import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from buffer.transport.messages import (
    Done,
    EvaluationQuery,
    EvaluationReport,
    EvaluationReports,
    Heartbeat,
    HeartbeatReply,
    Message,
)
from learner.monitoring.heartbeat import Heartbeats
from learner.monitoring.observer import Observer

REPORT = EvaluationReport("actor-0", 3, 3, 10, 0.25, 0.1, 5.0, 0.1)


class Buffer:
    """Answers queries with `answers` in turn, the last one for ever."""

    def __init__(self, *answers: EvaluationReports) -> None:
        self._answers = list(answers)
        self.beats: list[Heartbeat] = []

    def call(self, message: Message, timeout_seconds: float | None = None) -> Message:
        if not isinstance(message, EvaluationQuery):
            return Done()
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]

    def ask(self, message: Message, waiting_for: str) -> Message:
        return self.call(message)

    def request(self, message: Message, timeout_seconds: float | None = None) -> Future[Message]:
        answer: Future[Message] = Future()
        answer.set_result(HeartbeatReply(3, True))
        if isinstance(message, Heartbeat):
            self.beats.append(message)
        return answer


def observe(buffer: Buffer, folder: Path) -> Observer:
    return Observer(buffer, Heartbeats(buffer, 0), buffer, folder, 3, rank=0, world_size=1)  # type: ignore[arg-type]


def test_a_running_evaluation_is_waited_for_beyond_the_time_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    running = [EvaluationReports((), is_running=True)] * 5
    observer = observe(Buffer(*running, EvaluationReports((REPORT,))), tmp_path)
    # The limit is shorter than one turn of the wait.
    observer.last_evaluation(3, 0.1, threading.Event())
    observer.close()
    assert "policy 3: pass@1 0.250 on 10 held-out prompts" in caplog.text


def test_an_evaluation_that_no_actor_runs_is_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    observer = observe(Buffer(EvaluationReports(())), tmp_path)
    observer.last_evaluation(3, 0.1, threading.Event())
    observer.close()
    assert "policy 3 was not evaluated in time" in caplog.text


def test_heartbeats_say_what_the_rank_does_and_for_how_long_while_it_does_it(tmp_path: Path):
    buffer = Buffer(EvaluationReports(()))
    observer = observe(buffer, tmp_path)
    observer.doing(3, "writes the checkpoint of policy 3")
    deadline = time.monotonic() + 60
    while len(buffer.beats) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # The same work goes on, said once more.
    observer.doing(3, "writes the checkpoint of policy 3")
    observer.heartbeat(3, activity="writes the checkpoint of policy 3")
    first, *_, last = buffer.beats
    assert {beat.activity for beat in buffer.beats} == {"writes the checkpoint of policy 3"}
    assert 0.5 < first.activity_seconds < last.activity_seconds
    observer.heartbeat(4, "groups from the actors")
    assert (buffer.beats[-1].policy_version, buffer.beats[-1].waiting_for) == (4, "groups from the actors")
    assert (buffer.beats[-1].activity, buffer.beats[-1].activity_seconds) == ("", 0.0)
    observer.close()
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}


def test_heartbeats_say_how_long_the_work_may_take_and_a_wait_interrupts_it(tmp_path: Path):
    buffer = Buffer(EvaluationReports(()))
    observer = observe(buffer, tmp_path)
    observer.doing(3, "writes the checkpoint of policy 3")
    observer.heartbeat(3, "the buffer")
    observer.heartbeat(3)
    observer.close()
    waiting, working = buffer.beats[-2:]
    assert (waiting.activity, waiting.waiting_for, waiting.limit_seconds) == ("", "the buffer", 0.0)
    assert (working.activity, working.waiting_for) == ("writes the checkpoint of policy 3", "")
    assert working.limit_seconds > 0 and working.num_pieces > waiting.num_pieces
