"""Actors: the real `Actor` in virtual time, with stand-ins for the engine, the scoring and the weights."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.actor import Actor
from actors.config import ActorConfig
from actors.tasks.base import Problem
from actors.tasks.task import Task
from actors.tasks.templates import Template
from buffer.trajectory import VersionSpan
from buffer.transport import messages
from buffer.transport.connection import RequestRefused
from tests.actors.stand_ins import Characters, Sampled
from tests.buffer.simulation.network import Client, Network
from tests.buffer.simulation.virtual_time import InvariantError, Process, World
from verifier.base import Score, Verdict

NUM_PROMPTS, MAX_TOKENS = 12, 24
OVERDUE_SECONDS = 15.0
"""Longest time of a group, which few reach whose requests end."""
TOO_LONG = 7
"""The prompt that leaves no room for an answer."""


def make_task() -> Task:
    """Short prompts, one that is too long, and two held-out ones."""
    questions = [f"{number:02d}" if number != TOO_LONG else "x" * MAX_TOKENS for number in range(NUM_PROMPTS + 2)]
    problems = [Problem(number, question, "") for number, question in enumerate(questions)]
    return Task("simulated", problems[:NUM_PROMPTS], problems[NUM_PROMPTS:], Template("{question}"))


TASK = make_task()


class Engine:
    """Takes a random time for each request; a completion may end under newer weights than it began with.

    Args:
        seconds: mean of the time.
        stuck: probability that a request never ends.
    """

    def __init__(self, world: World, seconds: float, stuck: float) -> None:
        self._world, self._seconds, self._stuck, self._version = world, seconds, stuck, -1

    async def sample(self, prompt_ids: Sequence[int], *, num_samples: int, **_: Any) -> list[Sampled]:
        started, rng = self._version, self._world.rng
        if self._stuck and rng.random() < self._stuck:
            await asyncio.Event().wait()
        seconds = self._seconds * rng.expovariate(1.0) + 0.01
        await asyncio.sleep(seconds * 8 if rng.random() < 0.03 else seconds)
        spans = (VersionSpan(0, started), *([VersionSpan(2, self._version)] if self._version != started else []))
        tokens = [np.array([rng.randrange(1, 100) for _ in range(4)], np.int32) for _ in range(num_samples)]
        return [Sampled(ids, -np.ones(4, np.float32), spans) for ids in tokens]

    async def load(self, weights: Any) -> None:
        await asyncio.sleep(self._world.uniform(0.0, 0.05))
        self._version = weights.policy_version

    async def is_responsive(self, seconds: float) -> bool:
        return True

    async def checksums(self) -> dict[str, str]:
        return {}


class Scores:
    """Stands in for the scoring pool: random rewards, at times no score for a whole group."""

    def __init__(self, world: World) -> None:
        self._rng = world.rng

    async def score_group(self, completions: Sequence[Any]) -> list[Score]:
        skipped, rng = self._rng.random() < 0.02, self._rng
        rewards = [rng.choice((0.0, 1.0)) for _ in completions]
        return [Score(r, {}, Verdict.CORRECT if r else Verdict.WRONG, skipped=skipped) for r in rewards]

    def counts(self) -> dict[str, int]:
        return {}


@dataclass
class Published:
    """The learner's newest weights, wherever they are kept."""

    newest: messages.Manifest | None = None


@dataclass
class Fetched:
    policy_version: int
    on_host: bool = False

    def release(self) -> None:
        pass


class Weights:
    """Stands in for the version client."""

    pulled_bytes = 0

    def __init__(self, world: World, published: Published, seconds: float) -> None:
        self._world, self._published, self._seconds = world, published, seconds

    async def wait_for_new(self, known_publication: str, wait_seconds: float) -> messages.Manifest | None:
        until = self._world.now + wait_seconds
        while self._world.now < until:
            newest = self._published.newest
            if newest is not None and newest.publication != known_publication:
                return newest
            await asyncio.sleep(0.25)
        return None

    async def fetch(self, manifest: messages.Manifest) -> Fetched:
        await asyncio.sleep(self._world.uniform(0.2, 1.0) * self._seconds)
        newest = self._published.newest
        if newest is not None and newest.policy_version > manifest.policy_version + 2:
            raise RequestRefused(f"version {manifest.policy_version} is gone")
        return Fetched(manifest.policy_version)

    def close(self) -> None:
        pass


class Incarnation:
    """One process of an actor, and what it knows to hold."""

    def __init__(self, host: ActorHost) -> None:
        world = host.world
        self.process = Process(world, host.name)
        self.client = Client(host.network, self.process, host.name, math.inf)
        self.client.heard = self._heard
        self.num_stored = self.num_evaluated = 0
        parts = Engine(world, host.rollout_seconds, host.stuck), Scores(world), self.client
        config = ActorConfig(
            "model",
            samples_per_group=2,
            max_new_tokens=8,
            max_tokens=MAX_TOKENS,
            max_groups_in_flight=host.max_groups_in_flight,
            sample_timeout_seconds=OVERDUE_SECONDS,
        )
        weights = Weights(world, host.published, host.fetch_seconds)
        fixed = config, TASK, Characters(), *parts, weights, Path("/nowhere")
        self.process.run(lambda: self._start(host, fixed))

    def _start(self, host: ActorHost, fixed: Any) -> None:
        self.process.on_end.append(lambda error: host.ended(self, error))
        world = host.world
        self.actor = Actor(host.name, *fixed, host.max_staleness, clock=lambda: world.now)
        self.process.start(self.actor.run())

    @property
    def held(self) -> set[str]:
        """Group ids that it works on, or has no receipt for."""
        return set(self.actor._rollouts)

    def _heard(self, request: messages.Message, answer: messages.Message) -> None:
        match request, answer:
            case _, messages.GroupReceipt():
                self.num_stored += answer.outcome == "stored"
            case messages.EvaluationReport(), messages.Done():
                self.num_evaluated += 1


class ActorHost:
    """Supervises the processes of one actor name. There may be several, of which only the newest is restarted.

    Args:
        rollout_seconds, fetch_seconds: means of a rollout's and a fetch's duration.
        stuck: probability that a rollout never ends.
    """

    def __init__(
        self,
        world: World,
        network: Network,
        published: Published,
        name: str,
        *,
        max_groups_in_flight: int,
        max_staleness: int,
        rollout_seconds: float,
        fetch_seconds: float,
        stuck: float,
        started: Callable[[Incarnation], object] = lambda _: None,
    ) -> None:
        self.world, self.network, self.published, self.name = world, network, published, name
        self.max_groups_in_flight, self.max_staleness = max_groups_in_flight, max_staleness
        self.rollout_seconds, self.fetch_seconds, self.stuck = rollout_seconds, fetch_seconds, stuck
        self.living: list[Incarnation] = []
        self.over: list[Incarnation] = []
        self.wanted = True
        """Whether a process that ends is replaced."""

    def start(self) -> None:
        self.living.append(Incarnation(self))
        self.living[-1].process.log("starts")

    def ended(self, incarnation: Incarnation, error: BaseException | None) -> None:
        incarnation.process.log(f"ends: {error!r}")
        if not isinstance(error, asyncio.CancelledError | RequestRefused | TimeoutError):
            raise InvariantError(f"{incarnation.process.identity} ended with {error!r}") from error
        self._bury(incarnation)

    def kill(self, incarnation: Incarnation) -> None:
        incarnation.process.kill()
        self._bury(incarnation)

    def leave(self, back_after: float | None) -> None:
        """Kill all processes; start one again in `back_after` seconds, or never."""
        self.wanted = False
        for incarnation in list(self.living):
            self.kill(incarnation)
        if back_after is not None:
            self.world.after(back_after, self._come_back)

    def _come_back(self) -> None:
        self.wanted = True
        self._restart()

    def _bury(self, incarnation: Incarnation) -> None:
        incarnation.client.close()
        was_newest = self.living[-1] is incarnation
        self.living.remove(incarnation)
        self.over.append(incarnation)
        if was_newest and self.wanted:
            self.world.after(self.world.uniform(0.5, 4.0), self._restart)

    def _restart(self) -> None:
        if self.wanted and not self.living:
            self.start()
