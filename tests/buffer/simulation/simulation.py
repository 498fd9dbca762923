"""One run of the whole protocol from one seed: its configuration, its faults, its check."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from buffer.config import BufferConfig
from buffer.curriculum_config import Skip, Stage, write_levels
from buffer.ledger import ledger
from buffer.service import service
from buffer.transport import messages
from tests.buffer.ledger.test_ledger_stateful import WAYS
from tests.buffer.simulation.actor_process import NUM_PROMPTS, TASK, ActorHost, Published
from tests.buffer.simulation.buffer_process import BufferHost
from tests.buffer.simulation.faults import Faults
from tests.buffer.simulation.invariants import Checker
from tests.buffer.simulation.learner_process import LearnerHost, Pace
from tests.buffer.simulation.network import Network
from tests.buffer.simulation.virtual_time import InvariantError, World

LEASE_SECONDS = 14.0
STORM_SECONDS = 90.0
CALM_BATCHES = 4
"""Batches at the end of a run that are made without further faults."""
BOUND_SECONDS = 240.0
"""Within this time after the last fault the learner must be at its last version."""
LEAST_PART = 1 / 8
"""Without faults no actor delivers less than this part of the mean."""
UNKNOWN_SECONDS = 3 * LEASE_SECONDS
"""So long a lease may be out that no living process knows of, while its process can talk to the buffer."""
LEVELS = [1, 2] * (NUM_PROMPTS // 2)
STAGES = [
    Stage(max_level=1, until_success=0.5, over_groups=4, at_least_steps=1, at_most_steps=5, samples_per_group=3),
    Stage(min_level=2, until_step=6, samples_per_group=2, max_new_tokens=7),
    Stage(),
]


@dataclass
class Outcome:
    """What happened in a run that kept all promises."""

    seed: int
    way: dict[str, Any]
    num_events: int
    virtual_seconds: float
    faults: Counter[str]
    receipts: Counter[str]
    stored_by_actor: dict[str, int] = field(default_factory=dict)


class SimulationError(AssertionError):
    """A promise was broken; the text has the seed, the command that reproduces it, and the last events."""


class Simulation:
    """All processes of one run."""

    def __init__(self, seed: int, root: Path, *, echo: bool = False, kinds: Sequence[str] = ()) -> None:
        self.seed = seed
        world = self.world = World(seed)
        world.echo = echo
        rng = world.rng
        self.way = rng.choice(WAYS)
        updates, size = rng.choice((1, 1, 1, 2)), rng.choice((2, 2, 4))
        num_batches = rng.randint(8, 14) * (3 if "none" in kinds else 1)
        slots = self.way.get("max_uses", 1)
        least = max(1 if self.way.get("on_stale") or self.way.get("sampler") else 0, slots - 1) * updates
        staleness = least + rng.choice((0, 1, 1, 2)) * updates
        durability = rng.choice(("memory", "normal", "normal", "full"))
        write_levels(root, LEVELS)
        self.config = BufferConfig(
            *(str(root), "simulated", NUM_PROMPTS, TASK.fingerprint, size, staleness, updates, num_batches),
            lease_seconds=LEASE_SECONDS,
            durability=durability,
            max_no_signal=0,
            stages=STAGES if rng.random() < 0.3 else [],
            skip_solved=Skip(success=1.0, seen=2),
            revisit_epochs=2,
            **self.way,
        )
        self.faults = Faults(self, kinds)
        self.starves_nobody = "none" in kinds and staleness > 0
        self.network = Network(world, self.faults.weather)
        self.published = Published()
        self.buffer = BufferHost(world, self.network, self.config, self._after_turn, self._reopened)
        if self.faults.cuts_power and durability != "memory":
            self.buffer.keep_images()
        self.pace = Pace(
            world_size=rng.choice((1, 1, 2)) if size // updates % 2 == 0 or updates == 1 else 1,
            updates_per_batch=updates,
            groups_per_batch=size,
            total_steps=num_batches * updates,
            train_seconds=rng.choice((0.1, 0.5, 1.5)),
            checkpoint_seconds=rng.choice((0.05, 0.5)),
            checkpoint_every=rng.choice((1, 2, 3)) * updates,
            evaluate_every=rng.choice((0, 4)),
        )
        self.checker = Checker(world, self.config)
        self.network.delivering = self.checker.delivery
        self.learner = LearnerHost(world, self.network, self.published, self.pace, self.checker.trained)
        self.actors = [
            ActorHost(
                world,
                self.network,
                self.published,
                f"actor-{number}",
                max_groups_in_flight=rng.choice((1, 2, 4, 8)),
                max_staleness=staleness,
                rollout_seconds=rng.choice((0.1, 0.4, 1.0)),
                fetch_seconds=rng.choice((0.05, 0.5)),
                stuck=rng.choice((0.0, 0.02)) if self.faults.has_any else 0.0,
            )
            for number in range(rng.choice((1, 2, 2, 3, 4)))
        ]
        if "none" in kinds:
            # The learner is the limit. Unequal actors, each of which has new weights before the next ones are there.
            self.learner.pace = self.pace = replace(self.pace, train_seconds=1.5)
        self.unknown_since: dict[str, float] = {}
        self.calm_since = -1.0

    def _reopened(self, forgot: bool) -> None:
        self.checker.reopened(self.buffer.reader, forgot=forgot)

    def _after_turn(self, sent: list[tuple[bytes, Any, int]]) -> None:
        for _, answer, _ in sent:
            self.checker.has_rolled_back |= isinstance(answer, messages.LearnerWelcome) and answer.num_rolled_back > 0
        self.checker.after_turn(self.buffer.reader, sent)

    # The run.

    def run(self) -> Outcome:
        """Run to the learner's end and check everything.

        Raises:
            InvariantError: when a promise is broken.
        """
        world = self.world
        self.buffer.start()
        self.learner.start()
        for actor in self.actors:
            world.after(world.uniform(0.0, 3.0), actor.start)
        self.faults.start()
        world.after(1.0, self._look)
        while not self.learner.is_over:
            world.step()
            if self.calm_since < 0 and self._storm_is_over():
                self._heal()
            if 0 <= self.calm_since < world.now - BOUND_SECONDS:
                raise InvariantError(self._who_waits())
        self._heal()
        self._check_end()
        stored = {actor.name: sum(i.num_stored for i in actor.living + actor.over) for actor in self.actors}
        return Outcome(
            self.seed, self.way, world.num_events, world.now, self.faults.counts, self.checker.outcomes, stored
        )

    def _storm_is_over(self) -> bool:
        left = self.pace.total_steps - self.learner.version
        return self.world.now > STORM_SECONDS or left <= CALM_BATCHES * self.pace.updates_per_batch

    def _heal(self) -> None:
        if self.calm_since >= 0:
            return
        self.calm_since = self.world.now
        self.world.log("", "no more faults")
        self.faults.stop()
        self.network.heal()

    def _who_waits(self) -> str:
        counts = Counter(row[2] for row in self.checker.states.values())
        server = self.buffer.server
        waits = (
            [f"{wait.who}: {wait.for_what}" for wait in server._turns.service.waits(self.world.now)] if server else []
        )
        return (
            f"{BOUND_SECONDS:.0f} s after the last fault the learner is at version {self.learner.version} of"
            f" {self.pace.total_steps}; {dict(counts)}; {'; '.join(waits)}"
        )

    def _known(self) -> set[str]:
        return {group_id for actor in self.actors for incarnation in actor.living for group_id in incarnation.held}

    def _doubled(self) -> list[str]:
        """Return the living processes of names that have several."""
        return [i.process.identity for actor in self.actors if len(actor.living) > 1 for i in actor.living]

    def _look(self) -> None:
        """Find leases that no living process knows of, and names of which two processes live on."""
        self.world.after(1.0, self._look)
        known = self._known()
        leased = {f"{row[0]}.{row[1]}" for row in self.checker.states.values() if row[2] == "leased"}
        quiet = self.calm_since >= 0
        self.unknown_since = {
            group_id: self.unknown_since.get(group_id, self.world.now) for group_id in sorted(leased - known) if quiet
        }
        if quiet and self._doubled() and self.world.now - self.calm_since > UNKNOWN_SECONDS:
            raise InvariantError(f"{self._doubled()} live on, {UNKNOWN_SECONDS:.0f} s after the last fault")
        for group_id, since in self.unknown_since.items():
            if self.world.now - since > UNKNOWN_SECONDS:
                row = self.checker.states[int(group_id.partition(".")[0])]
                raise InvariantError(
                    f"group {group_id} is leased to {row[4]} and no process knows of it for {UNKNOWN_SECONDS:.0f} s"
                )

    def _check_end(self) -> None:
        end = self.world.now + 2.0
        while self.world.now < end or (self._doubled() and self.world.now < end + UNKNOWN_SECONDS):
            self.world.step()
        if self._doubled():
            raise InvariantError(f"{self._doubled()} live on, {UNKNOWN_SECONDS:.0f} s after the end of the run")
        if self.starves_nobody:
            stored = {actor.name: sum(i.num_stored for i in actor.living) for actor in self.actors}
            if min(stored.values()) < LEAST_PART * sum(stored.values()) / len(stored):
                raise InvariantError(f"an actor starved without any fault; groups by actor: {stored}")
        self.checker.account(self.buffer.reader, self.learner.checkpoints[-1][1])

    def close(self) -> None:
        """End all processes."""
        processes = [i.process for actor in self.actors for i in actor.living + actor.over]
        processes += self.learner.over + ([self.learner.process] if self.learner.process else [])
        for process in processes:
            process.forget()
        self.buffer.close()


def simulate(seed: int, *, echo: bool = False, kinds: Sequence[str] = ()) -> Outcome:
    """Run one seed; with faults of `kinds` only, if any are given.

    Raises:
        SimulationError: when a promise is broken.
    """
    memory = Path("/dev/shm")
    with ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(prefix="simulation-", dir=memory if memory.is_dir() else None)
        # Half of the runs fetch groups one by one, as if the groups were large.
        stack.enter_context(patch.object(service, "SHARD_BYTES", (0, service.SHARD_BYTES)[seed % 2]))
        stack.enter_context(patch.object(ledger, "host_id", lambda: simulation.buffer.boot))
        simulation = Simulation(seed, Path(stack.enter_context(folder)), echo=echo, kinds=kinds)
        stack.callback(simulation.close)
        try:
            return simulation.run()
        except Exception as error:
            trace, given = "\n".join(simulation.world.trace), f" --kinds '{','.join(kinds)}'" if kinds else ""
            raise SimulationError(
                f"seed {seed} ({simulation.way}, {dict(simulation.faults.counts)}): {error!r}\n"
                f"reproduce with: python -m tests.buffer.simulation --seed {seed} --trace{given}\n{trace}"
            ) from error
