"""Requests to the buffer that the learner cannot go on without: they wait without a deadline, and are shown.

While the ledger's disk is full the buffer answers no request that writes, and while the buffer is down it answers none.
The learner then waits as the actors do: the connection sends the request again until it is answered, heartbeats say
what the learner waits for, and the log has a line when the wait begins to be noticed and then at growing intervals.

Waits for: the buffer's answer. Unblocked by: the answer, or `stopping`. Gives up after: `STOPPING_SECONDS` from the
moment `stopping` is seen; never before. A request for the last checkpoint is given up only if the buffer is gone: if it
has not even said how it is for `STOPPING_SECONDS`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait

import torch

from buffer.transport.connection import Connection
from buffer.transport.messages import Message, Status, StatusRequest
from learner.distributed.collectives import all_reduce_max, rank_and_world_size

logger = logging.getLogger(__name__)

STOPPING_SECONDS = 20.0
"""How long a learner that was told to end still waits for all its requests together, or for a sign of life of the
buffer: longer than a buffer takes to restart."""
FIRST_LINE_SECONDS = 2.0
"""A wait this long is logged and shown; the next lines come after twice the time each."""
LONGEST_PAUSE_SECONDS = 600.0
"""Longest time between two lines about one wait."""
STATUS_SECONDS = 5.0
"""How often the buffer is asked for its state during a wait."""
_ROUND_SECONDS = 0.5

_WAITING, _ANSWERED, _GAVE_UP, _FAILED = range(4)


class PatientRequests:
    """Asks the buffer and waits for the answer.

    Args:
        buffer: connection to the buffer.
        heartbeat: called with what this rank waits for, twice a second during a wait that is shown, and at its end with
            an empty text.
        stopping: set from outside to end the learner soon.
        device: device of the collectives.
    """

    def __init__(
        self,
        buffer: Connection,
        heartbeat: Callable[[str], object],
        stopping: threading.Event,
        device: torch.device,
    ) -> None:
        self._buffer, self._heartbeat, self._stopping, self._device = buffer, heartbeat, stopping, device
        self._stopped_at = math.inf
        """When `stopping` was first seen."""

    def begin_epoch(self, epoch: int) -> None:
        """All later messages of this rank carry the learner's epoch (`LearnerWelcome`)."""
        self._buffer.epoch = epoch

    def ask(self, message: Message, waiting_for: str, *, until_gone: bool = False) -> Message | None:
        """Send `message` and wait for the answer. None: `stopping` was set and no answer came in time.

        Args:
            message: the request.
            waiting_for: words that complete "waits for".
            until_gone: also after `stopping` wait as long as the buffer lives.

        Raises:
            RequestRefused: the buffer refuses.
            ConnectionError: the connection is closed.
        """
        future, look = self._buffer.request(message, timeout_seconds=math.inf), _Look(self._buffer)
        shown = _ShownWait(waiting_for, self._heartbeat)
        while (state := self._wait(future, look, until_gone)) == _WAITING:
            shown.go_on(look.trouble)
        shown.end(answered=state == _ANSWERED)
        if state == _GAVE_UP:
            future.cancel()
            return None
        return future.result()

    def ask_together(self, message: Message, waiting_for: str, *, until_gone: bool = False) -> Message | None:
        """Ask on rank 0, and wait on every rank; every rank must call it. Other ranks get the message back.

        Returns None on every rank when rank 0 gave up. The ranks meet in a collective at every round of the wait, so
        the process group's timeout does not end it.

        Raises:
            RequestRefused, ConnectionError: on rank 0, as in `ask`.
            ConnectionError: on the other ranks, when rank 0 raises.
        """
        rank, world_size = rank_and_world_size()
        if world_size == 1:
            return self.ask(message, waiting_for, until_gone=until_gone)
        future = self._buffer.request(message, timeout_seconds=math.inf) if rank == 0 else None
        shown, look = _ShownWait(waiting_for, self._heartbeat), _Look(self._buffer)
        while (state := self._agree(_WAITING if future is None else self._wait(future, look, until_gone))) == _WAITING:
            shown.go_on(look.trouble)
        shown.end(answered=state == _ANSWERED)
        if state == _GAVE_UP:
            if future is not None:
                future.cancel()
            return None
        if future is not None:
            return future.result()
        if state == _FAILED:
            raise ConnectionError(f"rank 0 got no answer to {type(message).__name__}; its log says why")
        return message

    def _agree(self, state: int) -> int:
        """Return rank 0's state on every rank; the other ranks give `_WAITING`, which is 0."""
        return int(all_reduce_max(torch.tensor([state], device=self._device))[0])

    def _wait(self, future: Future[Message], look: _Look, until_gone: bool) -> int:
        """Wait for one round. Returns the state of the request."""
        if wait([future], timeout=_ROUND_SECONDS).done:
            return _ANSWERED if future.exception() is None else _FAILED
        now = time.monotonic()
        look.go_on(now)
        if self._stopping.is_set():
            self._stopped_at = min(self._stopped_at, now)
        waited = now - self._stopped_at
        if until_gone:
            waited = min(waited, look.silent_seconds(now))
        if waited < STOPPING_SECONDS:
            return _WAITING
        if until_gone:
            logger.error(
                "the buffer is gone: it has not answered for %.0f s since this learner was told to end", waited
            )
        return _GAVE_UP


class _Look:
    """Asks the buffer for its state every few seconds: whether it answers, and what it waits for.

    A buffer whose disk is full answers this too.

    Args:
        buffer: connection to the buffer.
    """

    def __init__(self, buffer: Connection) -> None:
        self._buffer = buffer
        self._asked_at = time.monotonic()
        self._status: Future[Message] | None = None
        self.trouble = ""
        """What the buffer waits for; empty: nothing, as far as is known."""

    def go_on(self, now: float) -> None:
        """Call at every round of a wait."""
        if self._status is None:
            if now - self._asked_at >= STATUS_SECONDS:
                self._status, self._asked_at = self._buffer.request(StatusRequest(), timeout_seconds=math.inf), now
        elif self._status.done():
            answered, self._status = self._status, None
            # A refusal is a sign of life, too. A closed connection fails the request that is waited for.
            status = None if answered.exception() else answered.result()
            if isinstance(status, Status):
                self.trouble = next((wait.for_what for wait in status.waits if wait.who == "buffer"), "")

    def silent_seconds(self, now: float) -> float:
        """How long the buffer has owed its state."""
        return 0.0 if self._status is None else now - self._asked_at


class BatchWait:
    """Shows during the wait for a batch when it is the buffer that is waited for: an answer, or space on its disk.

    The wait for groups has no limit: while actors live they bring them, and without actors somebody may start one.

    Args:
        buffer: connection to the buffer, which is asked for its state every few seconds.
    """

    def __init__(self, buffer: Connection) -> None:
        self._look = _Look(buffer)
        self._shown: _ShownWait | None = None

    def go_on(self) -> None:
        """Call at every round of the wait."""
        now = time.monotonic()
        self._look.go_on(now)
        if self._look.trouble or self._look.silent_seconds(now) > STATUS_SECONDS:
            self._shown = self._shown or _ShownWait(self._look.trouble or "the buffer to answer", lambda _: None)
            self._shown.go_on()
        else:
            self.end()

    def end(self) -> None:
        """Call when the wait is over."""
        if self._shown is not None:
            self._shown.end(answered=True)
            self._shown = None


class _ShownWait:
    """Shows one wait in the log and in the heartbeats."""

    def __init__(self, waiting_for: str, heartbeat: Callable[[str], object]) -> None:
        self._waiting_for, self._heartbeat = waiting_for, heartbeat
        self._began = time.monotonic()
        self._next_line = FIRST_LINE_SECONDS
        self._is_shown = False

    def go_on(self, trouble: str = "") -> None:
        """Call at every round of the wait. `trouble`: what the buffer waits for itself, if that is known."""
        waited = time.monotonic() - self._began
        what = f"{self._waiting_for}, which waits for {trouble}" if trouble else self._waiting_for
        if waited >= self._next_line:
            self._is_shown = True
            logger.warning("waits for %s (%.0f s so far)", what, waited)
            self._next_line = waited + min(waited, LONGEST_PAUSE_SECONDS)
        if self._is_shown:
            self._heartbeat(what)

    def end(self, *, answered: bool) -> None:
        """Call when the wait is over."""
        if self._is_shown:
            self._heartbeat("")
            outcome = "waited for" if answered else "no longer waits for"
            logger.warning("%s %s: %.0f s", outcome, self._waiting_for, time.monotonic() - self._began)
