"""The faults of a run. Each seed has some kinds of them, at its own rate, and its own weather.

Args of `Faults`: the simulation, and the kinds of its faults; without them the seed chooses; `none`: no faults at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tests.buffer.simulation.network import Weather
from tests.buffer.simulation.virtual_time import Process

if TYPE_CHECKING:
    from tests.buffer.simulation.actor_process import ActorHost
    from tests.buffer.simulation.simulation import Simulation

LEASE_SECONDS = 14.0
KINDS = (
    "actor killed",
    "actor terminated",
    "actor gone",
    "actor frozen",
    "actor cut off",
    "actor twice",
    "learner killed",
    "learner overtaken",
    "learner frozen",
    "learner cut off",
    "buffer killed",
    "buffer frozen",
    "buffer error",
    "power cut",
    "disk full",
)


class Faults:
    """Injects faults into a simulation until `stop`."""

    def __init__(self, simulation: Simulation, kinds: Sequence[str] = ()) -> None:
        self._simulation, self._world = simulation, simulation.world
        rng = self._world.rng
        # Few kinds in many seeds, because other faults often undo what one did wrong.
        drawn = sorted(rng.sample(KINDS, rng.choice((1, 1, 2, 3, 5, 8))))
        self._kinds = [] if "none" in kinds else list(kinds) or drawn
        self._interval = rng.choice((1.0, 3.0, 8.0))
        self.weather = Weather()
        if rng.random() < 0.6 and "none" not in kinds:
            self.weather = Weather(
                *(rng.choice((0.0, 0.02, 0.2)), rng.choice((0.0, 0.05, 0.3)), rng.choice((0.0, 0.01, 0.1))),
                late_seconds=rng.choice((0.5, 5.0, 30.0)),
            )
        if simulation.config.durability == "memory":
            self._kinds = [kind for kind in self._kinds if kind != "power cut"]
        self.has_any = bool(self._kinds) or self.weather != Weather()
        self.cuts_power = "power cut" in self._kinds
        self.counts: Counter[str] = Counter()
        self._over = not self._kinds

    def start(self) -> None:
        self._plan()

    def stop(self) -> None:
        """End the faults; what has an end of its own, like a freeze, comes to it."""
        self._over = True
        if self._simulation.buffer.disk_is_full:
            self._simulation.buffer.fill_disk(False)

    def _plan(self) -> None:
        self._world.after(self._world.rng.expovariate(1.0) * self._interval, self._inject)

    def _inject(self) -> None:
        if self._over:
            return
        kind = self._world.rng.choice(self._kinds)
        whom, _, what = kind.partition(" ")
        happened = {
            "actor": self._to_an_actor,
            "learner": self._to_the_learner,
            "buffer": self._to_the_buffer,
            "power": self._to_the_power,
            "disk": self._to_the_disk,
        }[whom](what)
        self.counts[kind] += bool(happened)
        self._plan()

    def _freeze_seconds(self) -> float:
        world = self._world
        return world.uniform(0.1, 3.0) if world.chance(0.5) else LEASE_SECONDS * world.uniform(0.9, 1.5)

    def _to_an_actor(self, what: str) -> bool:
        world = self._world
        actor: ActorHost = world.rng.choice(self._simulation.actors)
        if not actor.living:
            return False
        incarnation = world.rng.choice(actor.living)
        match what:
            case "killed":
                actor.kill(incarnation)
            case "gone":
                if sum(other.wanted for other in self._simulation.actors) < 2:
                    return False
                actor.leave(world.uniform(20.0, 60.0) if world.chance(0.5) else None)
            case "terminated":
                incarnation.process.terminate()
                world.after(5.0, lambda: actor.kill(incarnation) if incarnation in actor.living else None)
            case "frozen" if world.chance(0.5):
                self._simulation.network.freeze_at_leases(incarnation.process, self._freeze_seconds())
            case "frozen":
                incarnation.process.freeze(self._freeze_seconds())
            case "cut off":
                self._simulation.network.cut(incarnation.process, self._freeze_seconds())
            case "twice":
                if len(actor.living) > 1:
                    return False
                actor.start()
        return True

    def _to_the_learner(self, what: str) -> bool:
        learner = self._simulation.learner
        process: Process | None = learner.process
        if process is None:
            return False
        match what:
            case "killed":
                learner.kill()
            case "overtaken":
                learner.is_overtaken = True
                learner.kill()
            case "frozen":
                process.freeze(self._freeze_seconds())
            case "cut off":
                self._simulation.network.cut(process, self._freeze_seconds())
        return True

    def _to_the_buffer(self, what: str) -> bool:
        buffer, world = self._simulation.buffer, self._world
        if buffer.process is None:
            return False
        restart_after = world.uniform(0.1, 3.0)
        if what == "frozen":
            buffer.process.freeze(self._freeze_seconds())
        elif what == "error":
            buffer.fail_within(world.rng.choice((1, 1, 2, 3)))
        else:
            when = world.rng.choice(("between", "inside", "unsent"))
            if when == "between":
                buffer.kill(restart_after)
            else:
                buffer.kill_within(when, restart_after)
        return True

    def _to_the_power(self, what: str) -> bool:
        if self._simulation.buffer.process is None:
            return False
        self._simulation.buffer.power_cut(self._world.uniform(0.1, 3.0))
        return True

    def _to_the_disk(self, what: str) -> bool:
        buffer = self._simulation.buffer
        if buffer.disk_is_full:
            return False
        buffer.fill_disk(True)
        self._world.after(self._world.uniform(0.5, 30.0), lambda: buffer.fill_disk(False))
        return True
