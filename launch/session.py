"""A run from the start of its processes to their end: watched, shown, restarted where they fail or hang.

Waits for: the learner's good end. Gives up after: a process that is needed has failed too often, or the run directory
is gone.
"""

from __future__ import annotations

import logging
import math
import time
from concurrent.futures import Future
from dataclasses import replace

from buffer.transport.connection import Connection
from buffer.transport.credentials import ensure_credentials
from buffer.transport.messages import Message, Status, StatusRequest
from launch.config.plan import RunPlan
from launch.processes.supervisor import RunFailedError, Supervisor
from launch.processes.topology import processes
from launch.processes.watch import Watch
from launch.terminal.display import Display

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25
HALTED_EVERY_SECONDS = 2.0
"""Between looks at who is halted, which read the environment of every process on the machine."""
UNANSWERED_SECONDS = 5.0
"""After this time without an answer of the buffer the display says so."""
LAST_WORDS_SECONDS = 30.0


class Session:
    """The processes of one run. Whoever makes one calls `close`.

    Args:
        plan: written down already.
        display: what a person sees.
        run_mark: the mark of everything the run starts.
    """

    def __init__(self, plan: RunPlan, display: Display, run_mark: str) -> None:
        self._plan, self._display, cluster = plan, display, plan.cluster
        self._total_steps = int(plan.sections["learner"]["total_steps"])
        self._started = time.monotonic()
        self._supervisor = Supervisor(
            processes(plan),
            plan.run_dir / "logs",
            max_restarts=cluster.max_restarts,
            healthy_seconds=cluster.healthy_seconds,
            run_mark=run_mark,
        )
        self._watch = Watch(cluster.hung_seconds)
        self._halted: set[str] = set()
        self._halted_look = 0.0
        self._last: Status | None = None
        credentials = ensure_credentials(plan.run_dir, encrypted=cluster.encryption == "curve")
        self._observer = Connection(plan.sections["buffer"]["address"], "launcher", credentials.for_client())
        self._asked: Future[Message] = self._ask()

    def run(self) -> Status:
        """Until the learner ends well. Returns the buffer's last words.

        Raises:
            RunFailedError: when the run cannot go on.
        """
        self._supervisor.start()
        while not self._turn():
            time.sleep(POLL_SECONDS)
        assert self._last is not None
        return self._last

    def close(self) -> None:
        """End all processes, the learner with a checkpoint if there is time."""
        self._observer.close()
        self._supervisor.stop(self._plan.cluster.grace_seconds)

    def _turn(self) -> bool:
        if not (self._plan.run_dir / "config.yaml").is_file():
            raise RunFailedError(
                f"run_dir={self._plan.run_dir} was removed or emptied while the run went on, and everything in it is"
                " lost; start again in another"
            )
        if self._supervisor.poll():
            if self._last_words().policy_version >= self._total_steps:
                return True
            # Somebody other than the launcher has asked it to stop.
            self._supervisor.start_again("learner")
        status = self._heard()
        now = time.monotonic()
        if now >= self._halted_look and self._plan.cluster.hung_seconds:
            self._halted, self._halted_look = self._supervisor.stopped(), now + HALTED_EVERY_SECONDS
        running = self._supervisor.running_seconds()
        for name, reason in self._watch.turn(now, status, self._halted, running).items():
            self._supervisor.kill(name, reason)
        self._show()
        return False

    def _heard(self) -> Status | None:
        """The buffer's answer, if it has come; the next question is asked at once."""
        if not self._asked.done():
            return None
        status, self._asked = self._asked.result(), self._ask()
        assert isinstance(status, Status), status
        self._supervisor.progress(status.policy_version)
        # A buffer that was restarted knows nobody for a moment.
        self._last = status if status.peers or self._last is None else replace(status, peers=self._last.peers)
        return status

    def _show(self) -> None:
        notes = list(self._supervisor.notes.values())
        notes += [f"{name} is halted" for name in sorted(self._halted)]
        if self._watch.unanswered_seconds > UNANSWERED_SECONDS:
            notes.append(f"the buffer has not answered for {self._watch.unanswered_seconds:.0f} s")
        if self._last is not None and self._last.peers:
            own = frozenset(self._supervisor.pids)
            self._display.status(self._last, notes, own)
        else:
            self._display.starting(time.monotonic() - self._started, notes)

    def _last_words(self) -> Status:
        """Of a buffer that may just be coming back; otherwise what it said last."""
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        # What is asked now is answered after the learner's last message.
        self._asked = self._ask()
        while time.monotonic() < deadline:
            self._supervisor.poll()
            if self._heard() is not None:
                break
            time.sleep(POLL_SECONDS)
        if self._last is None:
            raise RunFailedError("the learner ended well, but the buffer never answered")
        return self._last

    def _ask(self) -> Future[Message]:
        return self._observer.request(StatusRequest(), timeout_seconds=math.inf)
