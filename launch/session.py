"""Starts the processes of a run, shows their status, and restarts those that fail or hang, until the run is over.

Waits for: the learner's exit with status 0 after the last step. Gives up after: a process that the run needs has failed
too often, or the run directory is gone.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from buffer.transport.connection import Connection, RequestRefused
from buffer.transport.credentials import client_credentials, ensure_credentials
from buffer.transport.messages import Message, Status, StatusRequest
from buffer.transport.roles import OBSERVER
from launch.config.plan import RunPlan
from launch.processes.supervisor import RunFailedError, Supervisor
from launch.processes.topology import processes
from launch.processes.watch import Watch
from launch.terminal.display import Display
from learner.checkpoints.manifest import newest_checkpoint

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25
HALTED_EVERY_SECONDS = 2.0
"""Interval of the search for halted processes, which reads the environment of every process on the machine."""
UNANSWERED_SECONDS = 5.0
"""Time without an answer of the buffer after which the display says so."""
SHOWN_WAIT_SECONDS = 1.0
"""How long the end of the run may wait for the learner before the display says so."""
FINAL_STATUS_SECONDS = 30.0
"""How long to wait for the buffer's status after the learner has ended."""


class Session:
    """The processes of one run. The caller must call `close`.

    Args:
        plan: of the run; config.yaml must be written already.
        display: shows the status.
        run_mark: value of the environment variable by which the run's processes are found.
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
        ensure_credentials(plan.run_dir, encrypted=cluster.encryption == "curve")
        credentials = client_credentials(plan.run_dir, OBSERVER)
        self._observer = Connection(plan.sections["buffer"]["address"], "launcher", credentials)
        self._asked: Future[Message] = self._ask()

    def run(self) -> Status:
        """Start all processes and watch them until the run is over. Returns the final status of the buffer.

        Raises:
            RunFailedError: the run cannot go on.
        """
        self._supervisor.start()
        while not self._turn():
            time.sleep(POLL_SECONDS)
        assert self._last is not None
        return self._last

    def close(self, at_once: Callable[[], bool]) -> None:
        """End all processes. The learner writes a checkpoint first.

        Waits for: the learner. Unblocked by: `at_once`. Gives up after: `cluster.grace_seconds`, if that is not 0.
        """
        self._supervisor.stop(self._plan.cluster.longest_grace_seconds, at_once, self._show_ending)
        self._observer.close()

    def _show_ending(self, seconds: float) -> None:
        """Say what the end of the run waits for. Quiet while the wait is short."""
        self._receive_status()
        if self._last is None or seconds < SHOWN_WAIT_SECONDS:
            return
        checkpoint = newest_checkpoint(self._plan.run_dir / "checkpoints")
        saved = "none yet" if checkpoint is None else f"policy {int(checkpoint.name)}"
        learner = next((peer for peer in self._last.peers if peer.name == "learner-0"), None)
        doing = learner.activity if learner else ""
        if learner and learner.waiting_for:
            doing = f"it waits for {learner.waiting_for}"
        self._display.ending(
            f"waiting for the learner's last checkpoint, {seconds:.0f} s"
            + (f" ({doing})" if doing else "")
            + f"; policy {self._last.policy_version} is reached, newest checkpoint: {saved};"
            " Ctrl-C or SIGTERM once more ends at once, without it"
        )

    def _turn(self) -> bool:
        if not (self._plan.run_dir / "config.yaml").is_file():
            raise RunFailedError(
                f"run_dir={self._plan.run_dir} was removed or emptied while the run went on, and everything in it is"
                " lost; start again in another"
            )
        if self._supervisor.poll():
            if self._final_status().policy_version >= self._total_steps:
                return True
            # Status 0 before the last step: the learner got a signal that the launcher did not send.
            self._supervisor.restart("learner")
        status = self._receive_status()
        if status is not None:
            self._supervisor.heard({peer.name: peer.silent_seconds for peer in status.peers if peer.role == "actor"})
        now = time.monotonic()
        if now >= self._halted_look and self._plan.cluster.hung_seconds:
            self._halted, self._halted_look = self._supervisor.stopped(), now + HALTED_EVERY_SECONDS
        running = self._supervisor.running_seconds()
        for name, reason in self._watch.turn(now, status, self._halted, running).items():
            self._supervisor.kill(name, reason)
        self._show()
        return False

    def _receive_status(self) -> Status | None:
        """The buffer's answer if it has arrived; the next request is then sent at once."""
        if not self._asked.done():
            return None
        answered, self._asked = self._asked, self._ask()
        try:
            status = answered.result()
        except RequestRefused as error:
            logger.warning("no status: %s", error)
            return None
        assert isinstance(status, Status), status
        self._supervisor.progress(status.policy_version)
        # A restarted buffer has not heard of any process yet.
        self._last = status if status.peers or self._last is None else replace(status, peers=self._last.peers)
        return status

    def _show(self) -> None:
        notes = list(self._supervisor.notes.values())
        notes += [f"{name} is halted" for name in sorted(self._halted)]
        if self._watch.unanswered_seconds > UNANSWERED_SECONDS:
            notes.append(f"the buffer has not answered for {self._watch.unanswered_seconds:.0f} s")
        if self._last is not None and self._last.peers:
            self._display.status(self._last, notes, frozenset(self._supervisor.pids))
        else:
            self._display.starting(time.monotonic() - self._started, notes)

    def _final_status(self) -> Status:
        """The buffer's status after the learner's end; its last earlier answer if it does not answer in time.

        Waits for: the buffer, which may be restarting. Gives up after: FINAL_STATUS_SECONDS.
        """
        deadline = time.monotonic() + FINAL_STATUS_SECONDS
        # The buffer answers a request sent now after it has read the learner's last message.
        self._asked = self._ask()
        while time.monotonic() < deadline:
            self._supervisor.poll()
            if self._receive_status() is not None:
                break
            time.sleep(POLL_SECONDS)
        if self._last is None:
            raise RunFailedError("the learner ended with status 0, but the buffer never answered")
        return self._last

    def _ask(self) -> Future[Message]:
        return self._observer.request(StatusRequest(tuple(self._supervisor.pids)), timeout_seconds=math.inf)
