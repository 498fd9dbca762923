"""The buffer's server loop: one ROUTER socket, one thread, many messages per transaction.

Every turn takes the waiting messages, handles them inside one ledger transaction (`buffer/service/turn.py`) and sends
the answers after the commit. An acknowledged group is therefore in the file. Waits for: messages. Gives up after:
`TICK_SECONDS`, and starts the next turn. `buffer/transport/router.py` drops invalid messages; the ledger counts them.
SIGTERM and SIGINT end the process after the current transaction.

An error while one message is handled refuses that message alone. If the disk is full, the transaction is rolled back
and its requests stay unanswered; clients resend them until there is space. If the run directory is deleted, the process
ends.
"""

from __future__ import annotations

import logging
import signal
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from buffer.config import BufferConfig
from buffer.ledger.ledger import Ledger
from buffer.ledger.ledger_file import FILE_NAME, is_about_the_file, is_out_of_space
from buffer.service.leases import Outgoing
from buffer.service.turn import PAUSE_SECONDS, Turns
from buffer.service.waits import REFRESH_SECONDS, save_waits
from buffer.transport.credentials import Credentials, server_credentials
from buffer.transport.messages import Status, StatusRequest, Wait
from buffer.transport.router import Router

log = logging.getLogger(__name__)

MESSAGES_PER_TURN = 256
SPACE_SECONDS = 0.5
"""Interval between two attempts to open a ledger whose disk is full."""
TICK_SECONDS = 0.2
"""Largest delay until the server notices the end of a lease, or a signal."""


class Server:
    """Serves a run's ledger at `config.address`.

    Args:
        config: the run.
        credentials: the run's id and keys.
        clock: returns seconds of a monotonic clock.
        open_router: makes the socket. A simulation passes its own clock and network.

    Raises:
        ValueError: when the ledger is in use or belongs to other data; or the address is in use, or is not local and
            the credentials have no keys.
    """

    def __init__(
        self,
        config: BufferConfig,
        credentials: Credentials,
        *,
        clock: Callable[[], float] = time.monotonic,
        open_router: Callable[[str, Credentials], Router] = Router,
    ) -> None:
        self._config, self._clock = config, clock
        self._stopping = False
        self._waits_saved = -REFRESH_SECONDS
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="waits")
        self._saving: Future[None] | None = None
        ledger = _open_ledger(config, clock)
        try:
            self._router = open_router(config.address, credentials)
        except BaseException:
            if ledger is not None:
                ledger.close()
            raise
        try:
            self._ledger = ledger or self._wait_for_space()
        except BaseException:
            self._router.close()
            raise
        self._turns = Turns(config, self._ledger, self._router.note)
        self.address = self._router.address
        """The bound address, with the actual port where the configured one has a wildcard."""

    def _wait_for_space(self) -> Ledger:
        """Open the ledger, whose disk is full. Meanwhile only requests for the status are answered.

        Waits for: space. Gives up after: never; the launcher's display shows the wait.
        """
        log.error("no space to open the ledger in %s; nothing is acknowledged until there is", self._config.run_dir)
        since = self._clock()
        while (ledger := _open_ledger(self._config, self._clock)) is None:
            self._router.socket.poll(int(SPACE_SECONDS * 1000))
            now = self._clock()
            wait = Wait("buffer", "space on the ledger's disk", now - since)
            status = Status({}, -1, closing=False, peers=(), reports=(), waits=(wait,))
            for incoming in self._router.receive(MESSAGES_PER_TURN, now)[0]:
                if isinstance(incoming.message, StatusRequest):
                    self._router.send(incoming.identity, status, incoming.number)
        return ledger

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
            self._saver.shutdown()
        log.info("buffer closed")

    def _turn(self) -> None:
        now = self._clock()
        messages, more_waiting = self._router.receive(MESSAGES_PER_TURN, now)
        self._ledger.file.check_present()
        for answer in self._turns.carry_out(messages, more_waiting, now, self._router.take_counts()):
            self._send(answer, now)
        if now - self._waits_saved >= REFRESH_SECONDS and (self._saving is None or self._saving.done()):
            self._waits_saved = now
            self._save_waits(now)

    def _send(self, answer: Outgoing, now: float) -> None:
        try:
            self._router.send(answer.identity, answer.message, answer.request_number)
        except (ValueError, TypeError, OverflowError) as error:
            # An answer that cannot be encoded is an error of its request, and of no other.
            what = f"the answer {type(answer.message).__name__}"
            refused = self._turns.refuse(answer.identity, answer.request_number, what, error, now)
            self._router.send(refused.identity, refused.message, refused.request_number)

    def _save_waits(self, now: float) -> None:
        try:
            waits = self._turns.service.waits(now)
        except Exception as error:
            if is_about_the_file(error):
                raise
            self._waits_saved = now + PAUSE_SECONDS
            self._turns.note_error("the list of waits", "all", error)
        else:
            # By a thread, because a network file system may block.
            if self._saving is not None:
                self._saving.result()
            self._saving = self._saver.submit(save_waits, Path(self._config.run_dir), waits)


def _open_ledger(config: BufferConfig, clock: Callable[[], float]) -> Ledger | None:
    """Open the ledger; None: it is there, and its disk is full. A run that begins on a full disk ends at once."""
    file = Path(config.run_dir) / FILE_NAME
    is_there = file.exists() and file.stat().st_size > 0
    try:
        return Ledger(config, clock())
    except sqlite3.Error as error:
        if not (is_there and is_out_of_space(error)):
            raise
        return None


def open_server(config: BufferConfig) -> Server:
    """Return the run's server, which SIGTERM and SIGINT stop. All that can be wrong with its settings raises here.

    Raises:
        ValueError: as for `Server`; or the run's keys cannot be read or written.
    """
    server = Server(config, server_credentials(config.run_dir))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    return server
