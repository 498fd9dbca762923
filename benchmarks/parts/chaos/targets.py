"""The processes of a run that faults hit, and the time each needs until it works again."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import psutil

ROLES = {"buffer": "buffer", "learner": "learner", "actors": "actor"}
"""Role of a process, by the module that it runs."""
RECOVERED = {
    "buffer": re.compile(r"buffer listens on"),
    "learner": re.compile(r"policy \d+ published"),
    "actor": re.compile(r"policy \d+ loaded"),
}
"""Line of the log by which a restarted process shows that it works again, by role."""


@dataclass
class Target:
    """A process of the run."""

    role: str
    name: str
    process: psutil.Process
    log: Path

    @property
    def log_bytes(self) -> int:
        """Current size of its log."""
        return self.log.stat().st_size if self.log.exists() else 0

    @property
    def tree(self) -> list[psutil.Process]:
        """The process and all its descendants."""
        return [self.process, *self.process.children(recursive=True)]


def targets(launcher: int, logs: Path, guests: Iterable[psutil.Process] = ()) -> list[Target]:
    """Return the living processes of the launcher, and `guests`: actors that were started by hand."""
    found = []
    for process in [*psutil.Process(launcher).children(), *guests]:
        with suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            role = next((ROLES[word] for flag, word in pairwise(words) if flag == "-m" and word in ROLES), "")
            if role and process.status() != psutil.STATUS_ZOMBIE:
                name = words[words.index("--name") + 1] if "--name" in words else role
                found.append(Target(role, name, process, logs / f"{name}.log"))
    return found


@dataclass
class Recoveries:
    """How long each role takes from a fault that ended its process until its log shows that it works again.

    A process that is hit again before that goes on counting from the first fault.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    _down: dict[str, tuple[float, int, Target]] = field(default_factory=dict)

    def ended(self, target: Target) -> None:
        """Note that a fault ends the process of `target` now."""
        since = self._down[target.name][0] if target.name in self._down else time.monotonic()
        self._down[target.name] = (since, target.log_bytes, target)

    @property
    def complete(self) -> bool:
        """Whether every process that was ended works again."""
        return not self._down

    def look(self) -> None:
        """Read what the logs have gained."""
        for name, (since, size, target) in list(self._down.items()):
            if target.log_bytes > size:
                with target.log.open("rb") as log:
                    log.seek(size)
                    new = log.read().decode(errors="replace")
                if RECOVERED[target.role].search(new):
                    self.seconds.setdefault(target.role, []).append(time.monotonic() - since)
                    del self._down[name]
