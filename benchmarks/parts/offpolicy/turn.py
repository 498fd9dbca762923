"""The stand-in for the buffer in `benchmarks/offpolicy.py`: trainer and actor take turns at an exact staleness."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

import torch

from buffer.transport.credentials import Credentials
from buffer.transport.messages import (
    BatchRequest,
    Done,
    EvaluationQuery,
    EvaluationReport,
    EvaluationReports,
    EvaluationRequest,
    Heartbeat,
    HeartbeatReply,
    LearnerHello,
    LearnerWelcome,
    Manifest,
    Message,
    Shard,
    Status,
    StatusRequest,
)
from buffer.transport.packed_group import PackedGroup
from buffer.weights.config import WeightsConfig
from learner.weights.store import NamedTensors, WeightStore


class Sampler(Protocol):
    """The actor's side, as the stand-in for the buffer uses it."""

    def load(self, manifest: Manifest) -> None:
        """Sample with this version from now on."""

    def groups(self, first_occurrence: int) -> tuple[PackedGroup, ...]:
        """Sample and score one batch: the prompts from `first_occurrence` on."""

    def evaluate(self) -> float:
        """Measure pass@1 on held-out prompts."""


class History:
    """A weight store that keeps every version and its manifest."""

    def __init__(self, directory: Path, address: str, num_versions: int) -> None:
        config = WeightsConfig(address, keep_versions=num_versions + 1)
        self._store = WeightStore(directory, config, Credentials.plain("offpolicy"))
        self._published: dict[int, Future[Manifest]] = {}
        self.on_publication: Callable[[], None] = lambda: None

    def publish(self, policy_version: int, tensors: NamedTensors, dtype: torch.dtype | None = None) -> Future[Manifest]:
        """Publishes a version as the weight store does, and then calls `on_publication`."""
        self._published[policy_version] = self._store.publish(policy_version, tensors, dtype)
        self.on_publication()
        return self._published[policy_version]

    def manifest(self, policy_version: int) -> Manifest | None:
        """The manifest of a version; None when it is not published.

        Waits for: the file of the version. Gives up after: 60 seconds.
        """
        published = self._published.get(policy_version)
        return published and published.result(60.0)

    def close(self) -> None:
        """As in the weight store."""
        self._store.close()


class InTurn:
    """Answers the trainer as the buffer does. The actor's side works only while the trainer waits for an answer.

    Args:
        sampler: the actor's side.
        manifest: returns the manifest of a version, or None when it is not published.
        staleness: batch v is sampled by version max(0, v - staleness); None: always by version 0.
        groups_per_batch: number of groups in a batch.
    """

    def __init__(
        self, sampler: Sampler, manifest: Callable[[int], Manifest | None], staleness: int | None, groups_per_batch: int
    ) -> None:
        self._sampler, self._manifest = sampler, manifest
        self._staleness, self._groups_per_batch = staleness, groups_per_batch
        self.reports: list[EvaluationReport] = []
        self._parked: tuple[BatchRequest, Future[Message]] | None = None

    def sampled_by(self, version: int) -> int:
        """The version that samples the batch of `version`."""
        return 0 if self._staleness is None else max(0, version - self._staleness)

    def request(self, message: Message, timeout_seconds: float | None = None) -> Future[Message]:
        """Answer a message at once, unless it asks for a batch from a version that is not published yet.

        Waits for: nothing; the future of such a batch is set by `go_on`.
        """
        answer: Future[Message] = Future()
        if isinstance(message, BatchRequest) and self._manifest(self.sampled_by(message.policy_version)) is None:
            self._parked = message, answer
        else:
            answer.set_result(self._answer(message))
        return answer

    def go_on(self) -> None:
        """Answer the parked batch request after a publication.

        The trainer asks for a batch before it publishes. At staleness 0 the version to publish samples that batch.
        """
        if self._parked is not None:
            (message, answer), self._parked = self._parked, None
            answer.set_result(self._answer(message))

    def call(self, message: Message, timeout_seconds: float | None = None) -> Message:
        """Answer a message at once."""
        return self._answer(message)

    def _answer(self, message: Message) -> Message:
        match message:
            case BatchRequest(policy_version=version):
                return self._batch(version)
            case EvaluationRequest(policy_version=version):
                return self._evaluate(version)
            case EvaluationQuery():
                return EvaluationReports(tuple(self.reports))
            case Heartbeat(policy_version=version):
                return HeartbeatReply(version, False)
            case StatusRequest():
                return Status({"issued": 0}, 0, False, (), ())
            case LearnerHello():
                return LearnerWelcome(0, 0)
        return Done()

    def _batch(self, version: int) -> Message:
        source = self.sampled_by(version)
        self._load(source)
        groups = self._sampler.groups(version * self._groups_per_batch)
        found = {group.header.oldest_version for group in groups}
        if found != {source}:
            raise RuntimeError(f"batch {version} was to be sampled by version {source} and was by {sorted(found)}")
        return Shard(version, len(groups), (version - source,) * len(groups), groups)

    def _evaluate(self, version: int) -> Message:
        started = time.monotonic()
        self._load(version)
        pass_at_1 = self._sampler.evaluate()
        seconds = time.monotonic() - started
        self.reports.append(EvaluationReport("actor-0", version, version, 1, pass_at_1, 0.0, 0.0, seconds))
        return Done()

    def _load(self, version: int) -> None:
        manifest = self._manifest(version)
        assert manifest is not None, version
        self._sampler.load(manifest)
