"""The order in which a weight server answers chunk requests: a few pulls at a time, each to its end.

A *pull* is everything that one connection asks for of one publication. If all pulls shared the link equally, many slow
pulls would all end when their version is dropped, and none would finish. So at most `most` pulls have a *turn*; the
others wait, and those of the newest version get the next turn. When a pull loses its version before its end, the number
of turns is halved, down to one; it grows again with every finished pull.

Owned by `buffer/weights/server.py`; one thread calls. `now` is seconds of a monotonic clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from buffer.transport.messages import ChunkRequest

IDLE_SECONDS = 10.0
"""Time without a request after which a pull loses its turn."""
LOST_SECONDS = 60.0
"""Time without a resend after which the requests of a waiting pull are dropped: its reader has ended or given up."""


@dataclass(slots=True)
class _Pull:
    publication: str
    base: str
    since: float
    heard: float
    has_turn: bool = False
    requests: dict[int, tuple[int, ChunkRequest]] = field(default_factory=dict)
    """(request number, request) by offset. A request that is sent again takes the place of the first copy."""


class PullQueue:
    """The chunk requests that are not answered yet.

    Args:
        most: largest number of pulls that have a turn at the same time.
    """

    def __init__(self, most: int) -> None:
        self._most = self._turns = most
        self._pulls: dict[bytes, _Pull] = {}
        """By connection. A connection pulls one publication at a time, so a later one replaces an earlier one."""

    @property
    def num_turns(self) -> int:
        """How many pulls may have a turn now."""
        return self._turns

    def add(self, identity: bytes, number: int, request: ChunkRequest, now: float) -> None:
        """Queue a chunk request of a connection."""
        pull = self._pulls.get(identity)
        if pull is None or (pull.publication, pull.base) != (request.publication, request.base):
            pull = self._pulls[identity] = _Pull(request.publication, request.base, now, now)
        pull.heard = now
        pull.requests[request.offset] = (number, request)

    def take(self, versions: Mapping[str, int], now: float) -> tuple[bytes, int, ChunkRequest] | None:
        """Remove the request to answer next. Returns its connection and number, and the request; None: none is due.

        Args:
            versions: policy version of each publication that is kept. Requests for others are due at once, because they
                are refused.
            now: the time.
        """
        self._end_idle(now)
        for identity, pull in self._pulls.items():
            if pull.requests and pull.publication not in versions:
                if pull.has_turn:
                    pull.has_turn, self._turns = False, max(1, self._turns // 2)
                return self._pop(identity, pull)
        for identity, pull in self._pulls.items():
            if pull.has_turn and pull.requests:
                # Back to the end of the line, so that pulls with a turn are answered alternately.
                del self._pulls[identity]
                self._pulls[identity] = pull
                return self._pop(identity, pull)
        if sum(pull.has_turn for pull in self._pulls.values()) >= self._turns:
            return None
        waiting = [
            (-versions[pull.publication], pull.since, name) for name, pull in self._pulls.items() if pull.requests
        ]
        if not waiting:
            return None
        identity = min(waiting)[2]
        self._pulls[identity].has_turn = True
        return self._pop(identity, self._pulls[identity])

    def end(self, identity: bytes) -> None:
        """Note that the last chunk of the connection's pull was sent."""
        self._pulls.pop(identity, None)
        self._turns = min(self._most, self._turns + 1)

    def _pop(self, identity: bytes, pull: _Pull) -> tuple[bytes, int, ChunkRequest]:
        number, request = pull.requests.pop(next(iter(pull.requests)))
        return identity, number, request

    def _end_idle(self, now: float) -> None:
        for identity, pull in list(self._pulls.items()):
            if now - pull.heard > (LOST_SECONDS if pull.requests else IDLE_SECONDS):
                del self._pulls[identity]
