"""The buffer's process: the real server and ledger file, killed between and inside transactions, with a disk that
fills up, and with a power cut that takes what was not written out."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from buffer.config import BufferConfig
from buffer.ledger.ledger_file import FILE_NAME
from buffer.service.server import Server
from buffer.transport.credentials import Credentials
from tests.buffer.simulation.network import RUN_ID, Network, Router
from tests.buffer.simulation.virtual_time import InvariantError, Process, World

TICK_SECONDS = 0.5
"""Time between two turns without messages: longer than the server's own, to save work."""
WRITTEN_OUT = 0.02
"""Probability per turn that the operating system has written everything out by then."""


class Killed(BaseException):
    """The process is killed at this instruction."""


class InjectedError(RuntimeError):
    """An error in the handling of a message, which must be undone."""


class BufferHost:
    """Restarts the buffer's process, and owns the disk with the ledger.

    Args:
        config: the run; its run_dir is a folder of the simulation.
        after_turn: called after every turn with the answers that were sent.
        reopened: called when a new process has opened the ledger; with True after a power cut.
    """

    def __init__(
        self,
        world: World,
        network: Network,
        config: BufferConfig,
        after_turn: Callable[[list[tuple[bytes, Any, int]]], object],
        reopened: Callable[[bool], object],
    ) -> None:
        self.world, self.network, self.config = world, network, config
        self._after_turn, self._reopened, self._forgot = after_turn, reopened, False
        self._root, self._disks = Path(config.run_dir), 0
        self.process: Process | None = None
        self.server: Server | None = None
        self._turn_due, self._killed = False, ""
        self.disk_is_full = False
        self.num_power_cuts = 0
        self._syncs = False
        """Whether this turn's commit waits for the disk."""
        self._images: list[bytes] = []
        """What the disk may hold after a power cut: the last synced state and later ones, oldest first."""
        self._keeps_images = False

    @property
    def boot(self) -> str:
        """The id of the running kernel."""
        return f"boot-{self.num_power_cuts}"

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    def keep_images(self) -> None:
        """Remember what the disk holds, for power cuts."""
        self._keeps_images = True

    # Life and death.

    def start(self) -> None:
        process = self.process = Process(self.world, "buffer")
        router = Router(self.network, self._wake)
        self.server = Server(
            self.config,
            Credentials.plain(RUN_ID),
            clock=lambda: self.world.now,
            open_router=lambda address, credentials: router,  # type: ignore[arg-type, return-value]
        )
        self._watch_syncs()
        self._fill(self.disk_is_full)
        self.reader = sqlite3.connect(self.run_dir / FILE_NAME, isolation_level=None)
        if self._keeps_images:
            self._images = [self.reader.serialize()]
        self.network.router = router
        self.network.disconnect()
        process.log("listens")
        self._reopened(self._forgot)
        self._forgot = False
        self._turn_due = False
        self._tick(process)

    def _watch_syncs(self) -> None:
        assert self.server is not None
        file: Any = self.server._ledger.file
        original = file.make_durable

        def make_durable() -> None:
            original()
            self._syncs = True

        file.make_durable = make_durable

    def kill(self, restart_after: float) -> None:
        """Kill the process between two turns."""
        if self.process is None:
            return
        self.process.kill()
        self._end(restart_after)

    def kill_within(self, when: str, restart_after: float) -> None:
        """Kill the process in its next turn: `inside` the transaction, or after the commit, `unsent`."""
        process, server = self.process, self.server
        if process is None or server is None:
            return

        target: Any = server._ledger.file if when == "inside" else server._router
        name = "write" if when == "inside" else "send"
        original, left = getattr(target, name), self.world.rng.choice((0, 0, 1, 3, 8))

        def die(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left >= 0:
                return original(*arguments)
            process.log(f"is killed: {when}")
            self._killed = when
            raise Killed

        setattr(target, name, die)
        self._restart_after = restart_after

    def fail_within(self, num_errors: int) -> None:
        """Let the handling of messages raise in the next turn that writes."""
        if self.server is None or self.disk_is_full:
            return
        file: Any = self.server._ledger.file
        original, left = file.write, self.world.rng.choice((0, 1, 2, 5))

        def fail(*arguments: Any) -> Any:
            nonlocal left, num_errors
            left -= 1
            if left >= 0 or not num_errors:
                return original(*arguments)
            num_errors -= 1
            self.world.log("buffer", "raises an error")
            raise InjectedError

        file.write = fail

    def power_cut(self, restart_after: float) -> None:
        """End the process; the disk forgets what was not written out."""
        if self.process is None:
            return
        image = self.world.rng.choice(self._images) if self.config.durability != "full" else self._images[-1]
        self.num_power_cuts += 1
        self.process.log(f"loses power; the disk holds state {self._images.index(image) + 1} of {len(self._images)}")
        self.process.kill()
        self._end(restart_after)
        self._disks, self._forgot = self._disks + 1, True
        run_dir = self._root / f"disk-{self._disks}"
        run_dir.mkdir()
        (run_dir / FILE_NAME).write_bytes(image)
        for extra in self.run_dir.glob("*.json"):
            (run_dir / extra.name).write_bytes(extra.read_bytes())
        self.config = replace(self.config, run_dir=str(run_dir))

    def _end(self, restart_after: float) -> None:
        assert self.process is not None and self.server is not None
        self.process.alive = False
        self.network.router = None
        self.reader.close()
        with suppress(sqlite3.Error):
            self.server._ledger.close()
        self.server._saver.shutdown()
        # The process was killed: it did not close its file in good order.
        (self.run_dir / "ledger.closed").unlink(missing_ok=True)
        self.process = self.server = None
        self.world.after(restart_after, self.start)

    # Turns.

    def _wake(self) -> None:
        if not self._turn_due and self.process is not None:
            self._turn_due = True
            self.world.after(self.world.uniform(0.0, 0.002), self._turn, self.process)

    def _tick(self, process: Process) -> None:
        def tick() -> None:
            self._wake()
            self._tick(process)

        self.world.after(TICK_SECONDS, tick, process)

    def _turn(self) -> None:
        self._turn_due = False
        server = self.server
        assert server is not None
        router: Any = server._router
        router.sent.clear()
        self._syncs, self._killed = self.config.durability == "full", ""
        try:
            server._turn()
        except Killed:
            # What was sent was said, whatever became of the transaction.
            self._after_turn(router.sent)
            self._keep_image()
            return self._end(self._restart_after)
        errors = [error for error in router.noted if not isinstance(error, InjectedError)]
        router.noted.clear()
        if errors:
            raise InvariantError(f"the buffer could not handle a message: {errors[0]!r}") from errors[0]
        self._after_turn(router.sent)
        if router._waiting:
            self._wake()
        self._keep_image()

    def _keep_image(self) -> None:
        """Note what a power cut would leave of the ledger after this turn."""
        if self._keeps_images and self._syncs and self._killed != "inside":
            self._images = [self.reader.serialize()]
        elif self._keeps_images and self.world.chance(WRITTEN_OUT):
            self._images.append(self.reader.serialize())

    # The disk.

    def fill_disk(self, is_full: bool) -> None:
        """Let every write to the ledger fail, or no longer."""
        self.disk_is_full = is_full
        self.world.log("buffer's disk", "is full" if is_full else "has space")
        if self.server is not None:
            self._fill(is_full)

    def _fill(self, is_full: bool) -> None:
        assert self.server is not None
        file: Any = self.server._ledger.file
        if is_full:
            original = file.write

            def fail(*arguments: Any) -> Any:
                if self.world.chance(0.3):
                    return original(*arguments)
                error = sqlite3.OperationalError("database or disk is full")
                error.sqlite_errorcode = sqlite3.SQLITE_FULL
                raise error

            file.write = fail
        elif "write" in vars(file):
            del file.write

    def close(self) -> None:
        """End the process for good."""
        if self.process is not None:
            self._end(1e9)


def rows(run_dir: Path, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(run_dir / FILE_NAME)) as database:
        return database.execute(sql, arguments).fetchall()
