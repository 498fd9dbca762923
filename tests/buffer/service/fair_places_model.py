"""Actors, learner and weights in virtual time, around the real service: what fair places are worth.

An actor finishes `speed` groups a second while it has any, however many: the engine for which many groups in flight
help least. With `batching` an engine takes a fixed time per group, however many it has: the engine for which they help
most. The learner takes `train_seconds` per batch; weights reach an actor its `load_seconds` later, give or take half.

`python -m tests.buffer.service.fair_places_model` prints the best fixed number of groups per actor for every case of
`tests/buffer/service/test_fair_places.py`, without shares.
"""

from __future__ import annotations

import heapq
import itertools
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from buffer.config import BufferConfig
from buffer.ledger.ledger import Ledger
from buffer.service.service import Service
from buffer.trajectory import FinishReason, Trajectory, TrajectoryGroup, VersionSpan
from buffer.transport import messages
from buffer.transport.packed_group import PackedGroup, pack_group

TICK_SECONDS = 0.2
"""Time between two turns of the buffer without messages."""
BATCHING_GROUPS = 4
"""Groups in flight at which an engine with `batching` is as fast as one without."""


@dataclass(frozen=True)
class Case:
    """One run of the model; throughput counts from batch `warm_up` on."""

    speeds: tuple[float, ...]
    """Groups a second, by actor."""
    groups_per_batch: int
    batches: int
    warm_up: int
    max_staleness: int = 2
    max_groups_in_flight: int = 64
    """Of every actor."""
    batching: bool = False
    with_shares: bool = True
    late: int | None = None
    """This actor asks for its first groups only after the warm-up."""
    deaf: int | None = None
    """This actor loads weights, but asks for groups only before the first batch."""
    slows: int | None = None
    """This actor is ten times slower from the end of the warm-up on."""
    train_seconds: float = 0.05
    load_seconds: tuple[float, ...] = (0.05,)
    """By actor, repeated."""
    on_stale: str = "wait"
    evaluate_every: int = 0
    """Batches between two evaluations; 0: none."""
    evaluate_seconds: float = 0.0
    """An actor that evaluates goes on with its groups, but loads no weights meanwhile."""


@dataclass
class Outcome:
    """What came of it, from the end of the warm-up on."""

    per_second: float = 0.0
    """Groups trained on."""
    finished: Counter[int] = field(default_factory=Counter)
    """Groups by actor."""
    evaluated: Counter[int] = field(default_factory=Counter)
    """Evaluations by actor, from the beginning."""
    useless: int = 0
    """Groups that became too stale, or lost tokens because they were."""
    target: float = 0.0
    """Groups in flight that the buffer aims at in the end."""


class Model:
    """One run in virtual time."""

    def __init__(self, case: Case, seed: int, run_dir: str) -> None:
        self.case, self.chance, self.now = case, random.Random(seed), 0.0
        settings: Any = {"groups_per_batch": case.groups_per_batch, "max_staleness": case.max_staleness}
        settings |= {"on_stale": case.on_stale}
        config = BufferConfig(run_dir, "ipc://x", 100_000, "abc", **settings, durability="memory")
        self.ledger = Ledger(config, 0.0)
        self.service = Service(config, self.ledger)
        if not case.with_shares:
            places = self.service._leases.places
            places.share = lambda actor: 1 << 30  # type: ignore[method-assign]
            places.is_out_of_turn = lambda actor, now: False  # type: ignore[method-assign]
        self.numbers, self.order = itertools.count(), itertools.count()
        self.events: list[tuple[float, int, str, tuple[Any, ...]]] = []
        size = len(case.speeds)
        self.held: list[dict[str, tuple[int, int]]] = [{} for _ in range(size)]
        """By actor: prompt and version of each group in flight, oldest first."""
        self.waiting, self.working, self.versions = [False] * size, [False] * size, [0] * size
        self.evaluating: dict[int, int] = {}
        """By actor that evaluates: the requested version."""
        self.version, self.begun_at, self.outcome = 0, 0.0, Outcome()

    def run(self) -> Outcome:
        self.tell(b"learner-0", messages.LearnerHello(0))
        for actor in range(len(self.case.speeds)):
            if actor != self.case.late:
                self.plan(self.chance.random() * 0.01, "ask", actor)
        self.plan(0.0, "batch")
        self.plan(TICK_SECONDS, "tick")
        while self.version < self.case.batches:
            self.now, _, what, details = heapq.heappop(self.events)
            getattr(self, what)(*details)
        self.outcome.useless = self.count_useless() - self.outcome.useless
        self.outcome.target = self.service._leases.places.in_flight
        self.ledger.close()
        trained = self.case.groups_per_batch * (self.case.batches - self.case.warm_up)
        self.outcome.per_second = trained / (self.now - self.begun_at)
        return self.outcome

    def plan(self, seconds: float, what: str, *details: Any) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.order), what, details))

    def tell(self, identity: bytes, *told: messages.Message) -> None:
        answers = []
        with self.ledger.transaction():
            for message in told:
                sent = messages.with_epoch(message, self.ledger.file.meta("epoch", 0))
                answers += self.service.receive(identity, sent, next(self.numbers), self.now)
            answers += self.service.wake(self.now)
        for answer in answers:
            match answer.message:
                case messages.LeaseReply():
                    actor = int(answer.identity.partition(b"-")[2])
                    if answer.message.evaluate_version >= 0:
                        self.evaluating[actor] = answer.message.evaluate_version
                        self.plan(self.case.evaluate_seconds, "evaluated", actor)
                    self.begin(actor, answer.message.leases)
                case messages.Shard():
                    self.plan(self.case.train_seconds, "made")

    def count_useless(self) -> int:
        counters = self.ledger.file.counters()
        return counters.get("stale", 0) + counters.get("masked", 0)

    def speed(self, actor: int) -> float:
        is_slow = actor == self.case.slows and self.version >= self.case.warm_up
        return self.case.speeds[actor] / (10 if is_slow else 1)

    # Events.

    def tick(self) -> None:
        self.tell(b"")
        self.plan(TICK_SECONDS, "tick")

    def ask(self, actor: int) -> None:
        room = self.case.max_groups_in_flight - len(self.held[actor])
        is_deaf = actor == self.case.deaf and self.version > 0
        if room > 0 and not self.waiting[actor] and not is_deaf:
            self.waiting[actor] = True
            evaluating = (self.evaluating[actor],) if actor in self.evaluating else ()
            where = f"actor-{actor}", self.versions[actor], room, "abc", tuple(self.held[actor]), evaluating
            self.tell(b"actor-%d" % actor, messages.LeaseRequest(*where))

    def begin(self, actor: int, leases: Sequence[messages.Lease]) -> None:
        self.waiting[actor] = False
        for lease in leases:
            self.held[actor][lease.group_id] = lease.prompt_id, self.versions[actor]
            if self.case.batching:
                seconds = self.chance.gauss(1.0, 0.15) * BATCHING_GROUPS / self.speed(actor)
                self.plan(max(0.001, seconds), "finish", actor, lease.group_id)
        if not self.case.batching:
            self.work(actor)
        self.plan(0.0, "ask", actor)

    def work(self, actor: int) -> None:
        if self.held[actor] and not self.working[actor]:
            self.working[actor] = True
            first = next(iter(self.held[actor]))
            self.plan(self.chance.expovariate(self.speed(actor)), "finish", actor, first)

    def finish(self, actor: int, group_id: str) -> None:
        prompt_id, version = self.held[actor].pop(group_id)
        self.outcome.finished[actor] += self.version >= self.case.warm_up
        self.working[actor] = False
        if not self.case.batching:
            self.work(actor)
        group = a_group(group_id, prompt_id, version)
        self.tell(b"actor-%d" % actor, messages.GroupDelivery(f"actor-{actor}", group))
        self.plan(0.0, "ask", actor)

    def evaluated(self, actor: int) -> None:
        version = self.evaluating.pop(actor)
        self.outcome.evaluated[actor] += 1
        figures = 10, 0.5, 0.25, 12.0, self.case.evaluate_seconds
        report = messages.EvaluationReport(f"actor-{actor}", version, self.versions[actor], *figures)
        self.tell(b"actor-%d" % actor, report)
        self.loaded(actor, self.version)

    def batch(self) -> None:
        self.tell(b"learner-0", messages.BatchRequest(self.version, 0, 1))

    def made(self) -> None:
        self.version += 1
        if self.version == self.case.warm_up:
            self.begun_at, self.outcome.useless = self.now, self.count_useless()
            if self.case.late is not None:
                self.plan(0.0, "ask", self.case.late)
        self.plan(0.0, "batch")
        if self.case.evaluate_every and not self.version % self.case.evaluate_every:
            self.tell(b"learner-0", messages.EvaluationRequest(self.version))
        for actor in range(len(self.case.speeds)):
            seconds = self.case.load_seconds[actor % len(self.case.load_seconds)]
            self.plan(seconds * (0.5 + self.chance.random()), "loaded", actor, self.version)

    def loaded(self, actor: int, version: int) -> None:
        if version > self.versions[actor] and actor not in self.evaluating:
            self.versions[actor] = version
            held = tuple(self.held[actor])
            self.tell(b"actor-%d" % actor, messages.Heartbeat("actor", f"actor-{actor}", version, "", {}, held))


def a_group(group_id: str, prompt_id: int, version: int) -> PackedGroup:
    trajectories = tuple(
        Trajectory(
            trajectory_id=f"{group_id}.{number}",
            group_id=group_id,
            prompt_id=prompt_id,
            token_ids=np.array([1, 2, 3], np.int32),
            loss_mask=np.array([False, True, True]),
            behavior_logprobs=np.array([0, -1, -1], np.float32),
            policy_versions=(VersionSpan(0, version),),
            reward=float(number),
            reward_breakdown={},
            verdict="wrong",
            finish_reason=FinishReason.STOP,
        )
        for number in range(1)
    )
    return pack_group(TrajectoryGroup(group_id, prompt_id, trajectories))


def play(case: Case, seed: int = 0) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="run-") as run_dir:
        return Model(case, seed, run_dir).run()


def main() -> None:
    from dataclasses import replace

    from tests.buffer.service.test_fair_places import CASES

    for name, (case, _) in CASES.items():
        most = 3 * case.groups_per_batch // len(case.speeds) + 1
        credits = [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if n <= most]
        found = {}
        for number in credits:
            fixed = replace(case, max_groups_in_flight=number, with_shares=False)
            found[number] = sum(play(fixed, seed).per_second for seed in (0, 1)) / 2
        best = max(found, key=lambda number: found[number])
        print(f"{name}: {found[best]:.1f} with {best}; {play(case).per_second:.1f} with shares", flush=True)


if __name__ == "__main__":
    main()
