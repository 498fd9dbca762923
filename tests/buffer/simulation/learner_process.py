"""The learner: what `learner/train.py` says to the buffer, in the same order, with several ranks and without a model.

A checkpoint is durable when it has its name. It holds its version and the lineage: the groups of every batch behind it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from buffer.transport import messages
from buffer.transport.connection import RequestRefused
from tests.buffer.simulation.actor_process import Published
from tests.buffer.simulation.network import Client, Network
from tests.buffer.simulation.virtual_time import InvariantError, Process, World

Lineage = dict[int, tuple[str, ...]]
"""The group ids of every batch, by its version."""


@dataclass(frozen=True)
class Pace:
    """How the learner works: seconds per batch and checkpoint, steps between checkpoints and evaluations."""

    world_size: int
    updates_per_batch: int
    groups_per_batch: int
    total_steps: int
    train_seconds: float
    checkpoint_seconds: float
    checkpoint_every: int
    evaluate_every: int


@dataclass
class LearnerHost:
    """Restarts the learner, and owns the disk with its checkpoints.

    Args:
        trained: called with version, groups and staleness of every batch that is trained on.
    """

    world: World
    network: Network
    published: Published
    pace: Pace
    trained: Callable[[int, list[Any], Lineage], object]
    checkpoints: list[tuple[int, Lineage]] = field(default_factory=list)
    process: Process | None = None
    version: int = 0
    """Of the present or last process."""
    lineage: Lineage = field(default_factory=dict)
    """Of the present process."""
    is_over: bool = False
    num_starts: int = 0
    is_overtaken: bool = False
    """Whether the next process dies soon, and its messages arrive late."""
    over: list[Process] = field(default_factory=list)

    def start(self) -> None:
        process = self.process = Process(self.world, "learner")
        self.num_starts += 1
        process.on_end.append(lambda error: self._ended(process, error))
        process.log("starts")
        if self.is_overtaken:
            self.is_overtaken = False
            self.network.hold_back(process, 30.0)
            self.world.after(self.world.uniform(1.0, 8.0), lambda: self.kill() if self.process is process else None)
        process.run(lambda: process.start(self._run(process)))

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self._bury()

    def _ended(self, process: Process, error: BaseException | None) -> None:
        process.log(f"ends: {error!r}")
        if error is None:
            self.is_over = True
            self.over.append(process)
            self.process = None
            return
        if not isinstance(error, RequestRefused | TimeoutError):
            raise InvariantError(f"the learner ended with {error!r}") from error
        self._bury()

    def _bury(self) -> None:
        assert self.process is not None
        self.over.append(self.process)
        self.process = None
        self.world.after(self.world.uniform(0.5, 5.0), self.start)

    # One process.

    async def _run(self, process: Process) -> None:
        pace, rng = self.pace, self.world.rng
        ranks = [Client(self.network, process, f"learner-{rank}", math.inf) for rank in range(pace.world_size)]
        first = ranks[0]
        saved, lineage = self.checkpoints[-1] if self.checkpoints else (-1, {})
        self.version, self.lineage = version, lineage = max(saved, 0), dict(lineage)
        process.log(f"resumes at {version}")
        epoch = 0
        while not epoch:
            before = await first.call(messages.StatusRequest())
            epoch = (await first.call(messages.LearnerHello(version, after_epoch=before.epoch))).epoch
        for rank in ranks:
            rank.epoch = epoch
        self._publish(process, version)
        if version == 0:
            first.request(messages.EvaluationRequest(0))
        while version < pace.total_steps:
            asked = [
                rank.request(messages.BatchRequest(version, number, pace.world_size), 1800.0)
                for number, rank in enumerate(ranks)
            ]
            shards = await self._receive(ranks, version, [asyncio.wrap_future(future) for future in asked])
            if isinstance(shards[0], messages.NoMoreBatches):
                raise InvariantError(f"the run ends: {shards[0].reason}")
            shards = [await self._complete(rank, shard) for rank, shard in zip(ranks, shards, strict=True)]
            for number, rank in enumerate(ranks):
                rank.request(messages.Heartbeat("learner", f"learner-{number}", version, "", {}), 60.0)
            await asyncio.sleep(pace.train_seconds * rng.uniform(0.5, 1.5))
            lineage[version] = tuple(group.header.group_id for shard in shards for group in shard.groups)
            self.trained(version, shards, lineage)
            before, version = version, version + pace.updates_per_batch
            self.version = version
            self._publish(process, version)
            if _is_due(version, before, pace.evaluate_every) and version < pace.total_steps:
                first.request(messages.EvaluationRequest(version))
            if _is_due(version, before, pace.checkpoint_every):
                saved = await self._checkpoint(first, version, lineage)
        if saved != version:
            await self._checkpoint(first, version, lineage)
        await self._finish(first, version)

    async def _receive(self, ranks: list[Client], version: int, futures: list[Any]) -> list[Any]:
        while True:
            done, waiting = await asyncio.wait(futures, timeout=0.5)
            if not waiting:
                return [future.result() for future in futures]
            for future in done:
                future.result()
            for number, rank in enumerate(ranks):
                waits = messages.Heartbeat("learner", f"learner-{number}", version, "groups from the actors", {})
                rank.request(waits, 60.0)

    async def _complete(self, rank: Client, shard: messages.Shard) -> messages.Shard:
        """Fetch the groups that the shard only names."""
        asked = [rank.call(messages.GroupRequest(shard.policy_version, occurrence)) for occurrence, _ in shard.rest]
        fetched = tuple(answer.group for answer in await asyncio.gather(*asked))
        return replace(shard, groups=shard.groups + fetched, rest=())

    def _publish(self, process: Process, version: int) -> None:
        publication = f"{process.identity}:{version}"
        self.published.newest = messages.Manifest(version, publication, "", "", 0, ())

    async def _checkpoint(self, first: Client, version: int, lineage: Lineage) -> int:
        await asyncio.sleep(self.pace.checkpoint_seconds * self.world.uniform(0.5, 1.5))
        await first.call(messages.CheckpointBegun(version))
        self.checkpoints.append((version, dict(lineage)))
        first.process.log(f"has the checkpoint of {version}")
        await first.call(messages.CheckpointCommitted(version))
        return version

    async def _finish(self, first: Client, version: int) -> None:
        first.request(messages.EvaluationRequest(version))
        await first.call(messages.Close())
        deadline = self.world.now + 300.0
        while self.world.now < deadline:
            first.request(messages.Heartbeat("learner", "learner-0", version, "the last evaluation", {}), 60.0)
            reports = await first.call(messages.EvaluationQuery(version))
            if reports.reports:
                break
            await asyncio.sleep(0.2)
        else:
            raise InvariantError(f"the last evaluation, of {version}, was not reported within 300 s")
        await first.call(messages.Heartbeat("learner", "learner-0", version, "", {}))


def _is_due(version: int, before: int, every: int) -> bool:
    return every > 0 and version // every != before // every
