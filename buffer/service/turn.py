"""One turn of the buffer: the waiting messages, handled in one ledger transaction, and an error in one of them undone.

Owned by `buffer/service/server.py`, and used by the fuzzer. If handling a message raises, the whole transaction is
undone, in the file and in memory, and the turn's messages are handled again one by one, each in a transaction of its
own. The message that raises is answered with `Refused`. It is logged with its traceback, counted as `message_errors`
and named in the status. An error while a parked request is answered refuses that request in the same way.

An error about the ledger's file is no message's fault. If the disk is full, the transaction is undone and its requests
stay unanswered until there is space; any other such error is raised and ends the process.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from buffer.config import BufferConfig
from buffer.ledger.ledger import Ledger
from buffer.ledger.ledger_file import is_about_the_file, is_out_of_space
from buffer.service.leases import Outgoing, holder_name
from buffer.service.service import Note, Service
from buffer.transport.messages import Refused, StatusRequest
from buffer.transport.router import Incoming

log = logging.getLogger(__name__)

SPACE_SECONDS = 5.0
"""The disk counts as having space again when no write has failed for this long."""
PAUSE_SECONDS = 10.0
"""How long to leave out what failed without a request to refuse: the end of silent actors' leases, or all answers."""


class Turns:
    """Handles the messages of one turn after another. `now` is seconds of a monotonic clock.

    Args:
        config: of the buffer.
        ledger: is not closed by this class.
        note: called with a peer's name, the error and the time when a message of the peer raised.
    """

    def __init__(self, config: BufferConfig, ledger: Ledger, note: Note = lambda *_: None) -> None:
        self._config, self._ledger, self._note = config, ledger, note
        self.service = Service(config, ledger, note)
        self._counts: Counter[str] = Counter()
        """What is not yet in the ledger's counters."""
        self._refused_space = -math.inf
        self._may_expire_at = self._may_wake_at = -math.inf

    def carry_out(
        self, messages: Sequence[Incoming], more_waiting: bool, now: float, counts: Mapping[str, int] | None = None
    ) -> list[Outgoing]:
        """Handle one turn's messages. Returns the answers, to be sent now: what they say is in the ledger.

        Args:
            messages: of this turn.
            more_waiting: whether more messages may be waiting.
            now: monotonic time.
            counts: to be added to the ledger's counters, by name.
        """
        self._counts.update(counts or {})
        try:
            return self._together(messages, more_waiting, now)
        except Exception as error:
            if is_out_of_space(error):
                return self._out_of_space(messages, now)
            if is_about_the_file(error):
                raise
            log.error("an error undid a turn of %d messages; they are handled one by one: %r", len(messages), error)
        return self._one_by_one(messages, more_waiting, now)

    def _together(self, messages: Sequence[Incoming], more_waiting: bool, now: float) -> list[Outgoing]:
        outgoing: list[Outgoing] = []
        num_changes = self._ledger.file.num_changes
        with self._ledger.transaction():
            for name, number in self._counts.items():
                self._ledger.file.count(name, number)
            for incoming in messages:
                outgoing += self._receive(incoming, now)
            if now >= self._may_wake_at:
                # No lease expires while messages are waiting, because they may include a heartbeat of its actor.
                may_expire = not more_waiting and now >= self._may_expire_at
                outgoing += self.service.wake(now, may_expire=may_expire)
        self._counts.clear()
        since, has_written = self.service.out_of_space_since, self._ledger.file.num_changes > num_changes
        if since is not None and has_written and now - self._refused_space >= SPACE_SECONDS:
            log.info("the ledger's disk has space again after %.0f s", now - since)
            self.service.out_of_space_since = None
        return outgoing

    def _receive(self, incoming: Incoming, now: float) -> list[Outgoing]:
        return self.service.receive(incoming.identity, incoming.message, incoming.number, now, incoming.role)

    def _one_by_one(self, messages: Sequence[Incoming], more_waiting: bool, now: float) -> list[Outgoing]:
        outgoing: list[Outgoing] = []
        for index, incoming in enumerate(messages):
            try:
                with self._ledger.transaction():
                    answers = self._receive(incoming, now)
            except Exception as error:
                if is_out_of_space(error):
                    return outgoing + self._out_of_space(messages[index:], now)
                if is_about_the_file(error):
                    raise
                what = type(incoming.message).__name__
                answers = [self.refuse(incoming.identity, incoming.number, what, error, now)]
            outgoing += answers
        return outgoing + self._wake(more_waiting, now)

    def _wake(self, more_waiting: bool, now: float) -> list[Outgoing]:
        """Answer the parked requests; refuse each one whose answer raises, until the others are answered."""
        refused: list[Outgoing] = []
        while now >= self._may_wake_at:
            try:
                return refused + self._together((), more_waiting, now)
            except Exception as error:
                if is_out_of_space(error):
                    return refused + self._out_of_space((), now)
                if is_about_the_file(error):
                    raise
                culprit = self.service.handling
                if culprit is not None and self.service.withdraw(*culprit):
                    refused.append(self.refuse(*culprit, "a parked request", error, now))
                elif not more_waiting and now >= self._may_expire_at:
                    self._may_expire_at = now + PAUSE_SECONDS
                    self.note_error("the end of leases", "silent actors", error)
                else:
                    self._may_wake_at = now + PAUSE_SECONDS
                    self.note_error("the answers to parked requests", "all", error)
        return refused

    def refuse(self, identity: bytes, number: int, what: str, error: Exception, now: float) -> Outgoing:
        """Note an error while `what` of a peer was handled. Returns the answer for the peer."""
        self.note_error(what, holder_name(identity), error)
        self._note(identity, error, now)
        reason = f"the buffer failed to handle {what}: {type(error).__name__}; its log has the traceback"
        return Outgoing(identity, number, Refused(reason, is_server_error=True))

    def note_error(self, what: str, whose: str, error: Exception) -> None:
        """Log, count and show an error while `what` was handled."""
        log.error("handling %s of %s failed and is undone", what, whose, exc_info=error)
        self._counts["message_errors"] += 1
        sentence = f"the buffer could not handle {what} of {whose} ({type(error).__name__}), its log has the traceback"
        self.service.last_error = "".join(c if c.isprintable() else "?" for c in sentence)

    def _out_of_space(self, messages: Sequence[Incoming], now: float) -> list[Outgoing]:
        """Reload the state from the file, as after a restart, because this turn's changes are lost.

        Only status requests are answered.
        """
        since, last_error = self.service.out_of_space_since, self.service.last_error
        if since is None:
            log.error("no space for the ledger in %s; nothing is acknowledged until there is", self._config.run_dir)
        self._refused_space = now
        # The end of leases is logged, and would be undone and tried again in every turn.
        self._may_expire_at = now + SPACE_SECONDS
        self.service = Service(self._config, self._ledger, self._note)
        self.service.out_of_space_since = now if since is None else since
        self.service.last_error = last_error
        asking = [incoming for incoming in messages if isinstance(incoming.message, StatusRequest)]
        return [Outgoing(incoming.identity, incoming.number, self.service.status(now)) for incoming in asking]
