"""The buffer's server loop: one ROUTER socket, one thread, many messages per transaction.

Every turn takes the waiting messages, handles them inside one ledger transaction and sends the answers after the
commit. An acknowledged group is therefore in the file. Waits for: messages. Gives up after: `TICK_SECONDS`, and starts
the next turn. `buffer/transport/router.py` drops invalid messages; the ledger counts them. SIGTERM and SIGINT end the
process after the current transaction.

If the disk is full, the transaction is rolled back and its requests stay unanswered; clients resend them until there is
space. If the run directory is deleted, the process ends.
"""

from __future__ import annotations

import logging
import signal
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

from buffer.config import BufferConfig
from buffer.ledger.ledger import Ledger
from buffer.ledger.ledger_file import is_out_of_space
from buffer.service.leases import Outgoing
from buffer.service.service import Service
from buffer.service.waits import REFRESH_SECONDS, save_waits
from buffer.transport.credentials import Credentials, server_credentials
from buffer.transport.messages import StatusRequest
from buffer.transport.router import Incoming, Router

log = logging.getLogger(__name__)

MESSAGES_PER_TURN = 256
TICK_SECONDS = 0.2
"""Largest delay until the server notices the end of a lease, or a signal."""
SPACE_SECONDS = 5.0
"""The disk counts as having space again when no write has failed for this long."""


class Server:
    """Serves a run's ledger at `config.address`.

    Raises:
        ValueError: when the ledger is in use or belongs to other data; or the address is in use, or is not local and
            the credentials have no keys.
    """

    def __init__(self, config: BufferConfig, credentials: Credentials) -> None:
        self._config = config
        self._ledger = Ledger(config, time.monotonic())
        self._service = Service(config, self._ledger)
        self._stopping = False
        self._refused_space = -SPACE_SECONDS
        self._waits_saved = -REFRESH_SECONDS
        try:
            self._router = Router(config.address, credentials)
        except BaseException:
            self._ledger.close()
            raise
        self.address = self._router.address
        """The bound address, with the actual port where the configured one has a wildcard."""

    def stop(self) -> None:
        """End `run` within `TICK_SECONDS`. May be called from a signal handler or another thread."""
        self._stopping = True

    def run(self) -> None:
        """Serve until `stop` is called, then close the ledger."""
        log.info("buffer listens on %s", self.address)
        try:
            while not self._stopping:
                self._router.socket.poll(int(TICK_SECONDS * 1000))
                self._turn()
        finally:
            self._router.close()
            self._ledger.close()
        log.info("buffer closed")

    def _turn(self) -> None:
        now = time.monotonic()
        messages, more_waiting = self._router.receive(MESSAGES_PER_TURN, now)
        self._ledger.file.check_present()
        try:
            outgoing = self._carry_out(messages, more_waiting, now)
        except sqlite3.OperationalError as error:
            if not is_out_of_space(error):
                raise
            outgoing = self._out_of_space(messages, now)
        for answer in outgoing:
            self._router.send(answer.identity, answer.message, answer.request_number)
        if now - self._waits_saved >= REFRESH_SECONDS:
            self._waits_saved = now
            save_waits(Path(self._config.run_dir), self._service.waits(now))

    def _carry_out(self, messages: Sequence[Incoming], more_waiting: bool, now: float) -> list[Outgoing]:
        """Handle one turn's messages in one transaction. Returns the answers, to be sent now."""
        outgoing: list[Outgoing] = []
        num_changes = self._ledger.file.num_changes
        with self._ledger.transaction():
            for name, number in self._router.take_counts().items():
                self._ledger.file.count(name, number)
            for incoming in messages:
                outgoing += self._service.receive(incoming.identity, incoming.message, incoming.number, now)
            # No lease expires while messages are waiting, because they may include a heartbeat of its actor.
            outgoing += self._service.wake(now, may_expire=not more_waiting)
        since, has_written = self._service.out_of_space_since, self._ledger.file.num_changes > num_changes
        if since is not None and has_written and now - self._refused_space >= SPACE_SECONDS:
            log.info("the ledger's disk has space again after %.0f s", now - since)
            self._service.out_of_space_since = None
        return outgoing

    def _out_of_space(self, messages: Sequence[Incoming], now: float) -> list[Outgoing]:
        """Reload the state from the file, as after a restart, because this turn's changes are lost.

        Only status requests are answered.
        """
        since = self._service.out_of_space_since
        if since is None:
            log.error("no space for the ledger in %s; nothing is acknowledged until there is", self._config.run_dir)
        self._refused_space = now
        self._service = Service(self._config, self._ledger)
        self._service.out_of_space_since = now if since is None else since
        asking = [incoming for incoming in messages if isinstance(incoming.message, StatusRequest)]
        return [Outgoing(incoming.identity, incoming.number, self._service.status(now)) for incoming in asking]


def serve(config: BufferConfig) -> None:
    """Run the buffer in this process until SIGTERM or SIGINT."""
    server = Server(config, server_credentials(config.run_dir))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    server.run()
