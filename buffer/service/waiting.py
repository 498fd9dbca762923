"""The parked lease requests: by the version of the actor's weights, which decides admission, then by whose turn it is.

Owned by `buffer/service/leases.py`. A request is found, added and removed in logarithmic time, so that a turn of the
buffer costs what changed and not how many actors wait.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

Rank = tuple[float, float]
"""Whose turn it is: the smallest comes first. `buffer/service/leases.py` says what the two numbers are."""
_Entry = tuple[Rank, int, bytes, int]
"""Rank, place in the queue, connection, and the number of the `put` that made the entry."""


class Waiting:
    """Connections with a parked request. An entry is valid until its connection is put again or removed."""

    def __init__(self) -> None:
        self._since: dict[bytes, int] = {}
        """Place in the queue, in the order in which the requests were parked."""
        self._valid: dict[bytes, tuple[int, int]] = {}
        """Version, and number of the newest `put`."""
        self._heaps: dict[int, list[_Entry]] = {}
        self._sizes: dict[int, int] = {}
        """Number of valid entries by version."""
        self._numbers = itertools.count()

    def __contains__(self, identity: bytes) -> bool:
        return identity in self._since

    def put(self, identity: bytes, version: int, rank: Rank) -> None:
        """Add a connection, or change its version and rank. It keeps its place among those with the same rank."""
        number = next(self._numbers)
        place = self._since.setdefault(identity, number)
        self._forget(identity)
        self._valid[identity] = version, number
        self._sizes[version] = self._sizes.get(version, 0) + 1
        heap = self._heaps.setdefault(version, [])
        heapq.heappush(heap, (rank, place, identity, number))
        if len(heap) > 2 * self._sizes[version] + 16:
            heap[:] = [entry for entry in heap if self._is_valid(entry)]
            heapq.heapify(heap)

    def remove(self, identity: bytes) -> None:
        """Remove a connection, if it is there."""
        if self._since.pop(identity, None) is not None:
            self._forget(identity)

    def versions(self) -> list[int]:
        """Return the versions that connections wait with."""
        return list(self._heaps)

    def first(self, version: int) -> tuple[Rank, int, bytes] | None:
        """Return rank, place and connection of the one with this version whose turn it is."""
        heap = self._heaps.get(version, [])
        while heap and not self._is_valid(heap[0]):
            heapq.heappop(heap)
        return heap[0][:3] if heap else None

    def oldest(self) -> Iterator[bytes]:
        """Return all connections, in the order in which their requests were parked."""
        return iter(self._since)

    def with_version(self, version: int) -> list[bytes]:
        """Return all connections with weights of `version` or newer, in no order."""
        heaps = (heap for known, heap in self._heaps.items() if known >= version)
        return [entry[2] for heap in heaps for entry in heap if self._is_valid(entry)]

    def _is_valid(self, entry: _Entry) -> bool:
        valid = self._valid.get(entry[2])
        return valid is not None and valid[1] == entry[3]

    def _forget(self, identity: bytes) -> None:
        valid = self._valid.pop(identity, None)
        if valid is not None:
            self._sizes[valid[0]] -= 1
            if not self._sizes[valid[0]]:
                del self._sizes[valid[0]], self._heaps[valid[0]]
