"""The next batch on its way: asked for, received, decoded and flattened while the trainer does something else.

One `Prefetch` per rank, owned by the training loop, which asks for the batch of a version as soon as it has made that
version, before it publishes, reports and saves. It can't be sooner: the buffer takes the request for the news that the
version is there, and from what is handed out it reckons how far ahead an actor may work.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import torch

from buffer.transport.connection import Connection
from buffer.transport.messages import (
    BatchRequest,
    Message,
    NoMoreBatches,
    Shard,
)
from buffer.transport.packed_group import unpack_group
from learner.batches.batch import TrainingBatch, occurrence_ranges


@dataclass(frozen=True, slots=True)
class Received:
    """What came for one version."""

    shard: Shard
    batch: TrainingBatch
    occurrences: str
    """The prompt occurrences of the batch, for the log."""


class Prefetch:
    """Asks for this rank's shards.

    Args:
        buffer: connection to the buffer.
        rank, world_size: of the learner.
        device: where the batch's tensors go.
        timeout_seconds: after which a request fails.
        attention_crossover_tokens: as `learner.batches.packing.even_cuts` has it; shards are dealt by the same cost.
    """

    def __init__(
        self,
        buffer: Connection,
        rank: int,
        world_size: int,
        device: torch.device,
        timeout_seconds: float,
        attention_crossover_tokens: float,
    ) -> None:
        self._buffer, self._rank, self._world_size = buffer, rank, world_size
        self._attention_crossover_tokens = attention_crossover_tokens
        self._device, self._timeout_seconds = device, timeout_seconds
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._asked: tuple[int, Future[Received | NoMoreBatches]] | None = None

    def ask(self, policy_version: int) -> Future[Received | NoMoreBatches]:
        """The batch for `policy_version`; asked for only once.

        The future raises TimeoutError when the buffer did not answer in time, RequestRefused when it refused,
        ConnectionError when the connection was closed.
        """
        if self._asked is None or self._asked[0] != policy_version:
            request = BatchRequest(policy_version, self._rank, self._world_size, self._attention_crossover_tokens)
            coming: Future[Received | NoMoreBatches] = Future()
            answer = self._buffer.request(request, timeout_seconds=self._timeout_seconds)
            answer.add_done_callback(lambda answered: self._arrived(answered, coming))
            self._asked = policy_version, coming
        return self._asked[1]

    def _arrived(self, answered: Future[Message], coming: Future[Received | NoMoreBatches]) -> None:
        # After `close` nobody waits for it.
        with suppress(RuntimeError):
            # In a thread of its own: the one that answers arrive in has heartbeats to carry.
            self._worker.submit(self._receive, answered, coming)

    def _receive(self, answered: Future[Message], coming: Future[Received | NoMoreBatches]) -> None:
        try:
            coming.set_result(self._unpack(answered.result()))
        except Exception as error:  # It belongs to whoever waits for the batch.
            coming.set_exception(error)

    def _unpack(self, answer: Message) -> Received | NoMoreBatches:
        if isinstance(answer, NoMoreBatches):
            return answer
        assert isinstance(answer, Shard), answer
        groups = [unpack_group(packed) for packed in answer.groups]
        batch = TrainingBatch.from_groups(groups, answer.staleness, answer.policy_version, self._device)
        return Received(answer, batch, occurrence_ranges(groups))

    def close(self) -> None:
        """Forget what is on its way."""
        self._worker.shutdown(wait=False, cancel_futures=True)
