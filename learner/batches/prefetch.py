"""Requests, receives, decodes and flattens the next batch while the training loop is busy.

The training loop owns one `Prefetch` per rank. The loop asks for the batch of a version as soon as the version exists,
before the loop publishes, reports and saves. Not earlier: the buffer treats the request as the announcement of the
version, and the number of batches that the buffer has sent limits how far ahead actors may work.
"""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from buffer.transport.connection import Connection
from buffer.transport.messages import BatchRequest, GroupRequest, Message, NoMoreBatches, Shard, ShardGroup
from buffer.transport.packed_group import BYTES_PER_TOKEN, unpack_group
from learner.batches.batch import TrainingBatch, occurrence_ranges

WINDOW_BYTES = 8 << 20
"""Bytes of groups that a rank has asked for and not received, unless one group is larger."""


@dataclass(frozen=True, slots=True)
class Received:
    """This rank's shard for one version."""

    shard: Shard
    """With all its groups."""
    batch: TrainingBatch
    occurrences: str
    """Prompt occurrences of the batch, for the log."""


class Prefetch:
    """Requests this rank's shards.

    Args:
        buffer: connection to the buffer.
        rank, world_size: of this learner rank.
        device: of the batch's tensors.
        attention_crossover_tokens: as in `learner.batches.packing.even_cuts`; the buffer balances shards by that cost.
    """

    def __init__(
        self,
        buffer: Connection,
        rank: int,
        world_size: int,
        device: torch.device,
        attention_crossover_tokens: float,
    ) -> None:
        self._buffer, self._rank, self._world_size = buffer, rank, world_size
        self._attention_crossover_tokens = attention_crossover_tokens
        self._device = device
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._asked: tuple[int, Future[Received | NoMoreBatches]] | None = None

    def ask(self, policy_version: int) -> Future[Received | NoMoreBatches]:
        """Request the batch for `policy_version`. Repeated calls for one version send one request.

        The future has no deadline: the actors may need hours for enough groups. It raises RequestRefused when the
        buffer refuses, and ConnectionError when the connection is closed.
        """
        if self._asked is None or self._asked[0] != policy_version:
            request = BatchRequest(policy_version, self._rank, self._world_size, self._attention_crossover_tokens)
            coming: Future[Received | NoMoreBatches] = Future()
            answer = self._buffer.request(request, timeout_seconds=math.inf)
            answer.add_done_callback(lambda answered: self._arrived(answered, coming))
            self._asked = policy_version, coming
        return self._asked[1]

    def _arrived(self, answered: Future[Message], coming: Future[Received | NoMoreBatches]) -> None:
        # After `close` the worker refuses, and no caller waits for the batch.
        with suppress(RuntimeError):
            # Unpacking takes long, and the connection's thread must keep sending heartbeats.
            self._worker.submit(self._receive, answered, coming)

    def _receive(self, answered: Future[Message], coming: Future[Received | NoMoreBatches]) -> None:
        try:
            coming.set_result(self._unpack(answered.result()))
        except BaseException as error:  # Raised where the batch is waited for.
            coming.set_exception(error)

    def _unpack(self, answer: Message) -> Received | NoMoreBatches:
        if isinstance(answer, NoMoreBatches):
            return answer
        assert isinstance(answer, Shard), answer
        shard = self._complete(answer)
        groups = [unpack_group(packed) for packed in shard.groups]
        batch = TrainingBatch.from_groups(groups, shard.staleness, shard.policy_version, self._device)
        return Received(shard, batch, occurrence_ranges(groups))

    def _complete(self, shard: Shard) -> Shard:
        """Fetch the groups that the shard only names, a few at a time.

        Waits for: the buffer. Gives up after: never; who waits for the batch does.
        """
        groups, in_flight = list(shard.groups), deque[tuple[int, Future[Message]]]()

        def take() -> None:
            answer = in_flight.popleft()[1].result()
            assert isinstance(answer, ShardGroup), answer
            groups.append(answer.group)

        for occurrence, num_tokens in shard.rest:
            num_bytes = num_tokens * BYTES_PER_TOKEN
            while in_flight and sum(size for size, _ in in_flight) + num_bytes > WINDOW_BYTES:
                take()
            request = GroupRequest(shard.policy_version, occurrence)
            in_flight.append((num_bytes, self._buffer.request(request, timeout_seconds=math.inf)))
        while in_flight:
            take()
        return replace(shard, groups=tuple(groups), rest=())

    def close(self) -> None:
        """Drop the batch that is being received."""
        self._worker.shutdown(wait=False, cancel_futures=True)
