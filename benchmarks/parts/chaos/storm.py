"""Faults of many kinds, at random times, against one run."""

from __future__ import annotations

import heapq
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import psutil

from benchmarks.parts.chaos.guest import Guest
from benchmarks.parts.chaos.poison import send_poison
from benchmarks.parts.chaos.power_cut import cut_power
from benchmarks.parts.chaos.targets import Recoveries, Target, targets
from buffer.transport.credentials import client_credentials

DECK = {
    "kill": 5,
    "kill a child": 2,
    "freeze": 4,
    "freeze a container": 1,
    "SIGTERM an actor": 2,
    "second incarnation": 1,
    "power cut": 2,
    "poisoned messages": 3,
    "full disk": 1,
}
"""Kinds of faults, and how often each occurs until all have occurred."""
FREEZE_SECONDS = (0.5, 8.0)
CONTAINER_SECONDS = (2.0, 8.0)
"""How much longer than a lease lasts all processes of an actor are frozen."""
DISK_SECONDS = 30.0


class Storm:
    """The faults of one run.

    Args:
        launcher: process id of the launcher.
        run_dir: of the run.
        logs: folder of its logs.
        guest: actors that are started by hand.
        lease_seconds: the run's `buffer.lease_seconds`.
        addresses: of the buffer and of the weight store, which get poisoned messages.
        images: folder of the ledger's files as of their last fsync; None: leave power cuts out.
        small_disk: whether `run_dir` is a file system of its own, which can be filled; if not, full disks are left out.
        seed: decides what happens, and when.
        interval_seconds: mean time between two faults.
    """

    def __init__(
        self,
        launcher: int,
        run_dir: Path,
        logs: Path,
        guest: Guest,
        *,
        lease_seconds: float,
        addresses: tuple[str, str],
        images: Path | None,
        small_disk: bool,
        seed: int,
        interval_seconds: float,
    ) -> None:
        self._launcher, self._run_dir, self._logs, self._guest = launcher, run_dir, logs, guest
        self._lease_seconds, self._addresses, self._images = lease_seconds, addresses, images
        self._interval = interval_seconds
        self._random = random.Random(seed)
        self._undoings: list[tuple[float, int, Callable[[], None]]] = []
        """(time, tie-breaker, function) of everything that a fault has to put right later, as a heap."""
        self._ties = count()
        self._busy: set[str] = set()
        """Kinds of which one fault is enough at a time, and one is going on."""
        self._next_fault = time.monotonic() + interval_seconds
        self.faults: Counter[str] = Counter()
        """Number of faults by kind."""
        self.hits: Counter[str] = Counter()
        """Number of faults by the role of the process they hit."""
        self.recoveries = Recoveries()
        left_out = {"power cut"} if images is None else set()
        left_out |= set() if small_disk else {"full disk"}
        self._kinds = [kind for kind, number in DECK.items() if kind not in left_out for _ in range(number)]
        self._deck: list[str] = []

    def step(self) -> None:
        """Inject a fault if it is time, put earlier ones right, and record recoveries."""
        now = time.monotonic()
        self._guest.step()
        self._undo(now)
        if now >= self._next_fault:
            self._next_fault = now + self._random.uniform(0.5, 1.5) * self._interval
            if not self._deck:
                self._deck = self._random.sample(self._kinds, len(self._kinds))
            with suppress(psutil.NoSuchProcess):
                kind = self._deck[-1]
                if self._inject(kind):
                    self.faults[kind] += 1
                    self._deck.pop()
                else:
                    # Not possible now, so its turn comes later.
                    self._deck.insert(0, self._deck.pop())
        self.recoveries.look()

    def end(self) -> None:
        """Put all faults right."""
        self._undo(float("inf"))

    def _undo(self, now: float) -> None:
        while self._undoings and self._undoings[0][0] <= now:
            heapq.heappop(self._undoings)[2]()

    def _later(self, seconds: float, function: Callable[[], None]) -> None:
        heapq.heappush(self._undoings, (time.monotonic() + seconds, next(self._ties), function))

    def _inject(self, kind: str) -> bool:
        """Do it. Returns False when it is not possible now."""
        match kind:
            case "kill" | "freeze" | "kill a child":
                return self._hit_one(kind)
            case "freeze a container":
                return self._freeze_container()
            case "SIGTERM an actor":
                return self._end_actor()
            case "second incarnation":
                return self._second_incarnation()
            case "power cut":
                return self._power_cut()
            case "poisoned messages":
                actor = client_credentials(self._run_dir, "actor")
                for address, credentials in zip(self._addresses, (actor, actor.for_weights()), strict=True):
                    send_poison(credentials, address, self._random)
                return True
            case _:
                return self._fill_disk()

    def _hit_one(self, kind: str) -> bool:
        target = self._choose()
        if target is None:
            return False
        process = target.process
        if kind == "kill a child":
            children = process.children(recursive=True)
            if not children:
                return False
            process = self._random.choice(children)
        self.hits[target.role] += 1
        if kind == "freeze":
            process.suspend()
            self._later(self._random.uniform(*FREEZE_SECONDS), lambda: _resume([process]))
            return True
        if kind == "kill":
            # A killed child may be replaced while its parent lives on, so the log shows no recovery.
            self.recoveries.ended(target)
        process.kill()
        return True

    def _freeze_container(self) -> bool:
        """Freeze an actor and all its processes for longer than its leases live."""
        target = self._choose("actor")
        if target is None or not self._begin("freeze a container"):
            return False
        self.hits["actor"] += 1
        tree = target.tree
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.suspend()

        def thaw() -> None:
            _resume(tree)
            self._busy.discard("freeze a container")

        self._later(self._lease_seconds + self._random.uniform(*CONTAINER_SECONDS), thaw)
        return True

    def _end_actor(self) -> bool:
        target = self._choose("actor")
        if target is None:
            return False
        self.hits["actor"] += 1
        self.recoveries.ended(target)
        target.process.terminate()
        return True

    def _second_incarnation(self) -> bool:
        if len(self._guest.processes) != 1:
            return False
        self._guest.start()
        return True

    def _power_cut(self) -> bool:
        target = self._choose("buffer")
        if target is None or self._images is None or not list(self._images.glob("*.sqlite")):
            return False
        if "full disk" in self._busy:
            # There is no room to put the files back.
            return False
        self.hits["buffer"] += 1
        self.recoveries.ended(target)
        cut_power(self._launcher, target.process, self._run_dir, self._images)
        return True

    def _fill_disk(self) -> bool:
        if not self._begin("full disk"):
            return False
        filler = self._run_dir / "filler"
        with suppress(OSError), filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(0, shutil.disk_usage(self._run_dir).free - (1 << 20)))
        with suppress(OSError), filler.open("ab") as file:
            while True:
                file.write(bytes(1 << 16))
                file.flush()

        def empty() -> None:
            filler.unlink(missing_ok=True)
            self._busy.discard("full disk")

        self._later(DISK_SECONDS, empty)
        return True

    def _begin(self, kind: str) -> bool:
        """Return whether no fault of this kind is going on; one is from now on."""
        free = kind not in self._busy
        self._busy.add(kind)
        return free

    def _choose(self, role: str = "") -> Target | None:
        """Choose a living process that is not frozen; of a random role, so that many actors do not spare the others."""
        found = targets(self._launcher, self._logs, self._guest.processes)
        found = [target for target in found if target.process.status() != psutil.STATUS_STOPPED]
        roles = sorted({target.role for target in found if role in ("", target.role)})
        if not roles:
            return None
        wanted = self._random.choice(roles)
        return self._random.choice([target for target in found if target.role == wanted])


def _resume(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)
