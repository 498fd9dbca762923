"""The requests of one connection that have no answer yet: which of them are to be sent now, first or again.

Owned by `buffer/transport/connection.py`. No sockets, no clock: times are arguments, in seconds of a monotonic clock.

A copy on a slow link is not a lost copy, and a second copy makes a slow link slower. So a request is sent again only

- when its connection broke (`disconnected`);
- when the server answered a later request and handles both kinds in order (`answered`): the earlier one was lost;
- after a time that doubles with every copy and begins when the copy before has left this process. For large requests
  that time is at least twice the longest time that one took before.

A new large request is sent only while fewer bytes of large requests than the *window* are on their way. The window
grows with every answer and is halved when one takes longer than `SOON_SECONDS`. Small requests go first and are not
counted. So they wait behind large ones for about that time, however slow the link.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from buffer.transport.messages import Message
from buffer.transport.schema import Frames

LARGE_BYTES = 1 << 16
"""Requests of at least this size count in the window and are sent without a copy."""
FIRST_WINDOW_BYTES, LARGEST_WINDOW_BYTES = 1 << 20, 8 << 20
SOON_SECONDS = 1.0
MAX_DOUBLINGS = 2
"""The time between two copies stays the same after this many doublings. A server that lost a parked request without
closing the connection, as after a full disk, gets it again within that time."""
IN_ORDER = "GroupDelivery"
"""Kind of request that servers answer in the order of arrival, relative to all later requests of the connection."""


@dataclass(slots=True, eq=False)
class Request:
    """A request without an answer."""

    number: int
    kind: str
    frames: Frames
    deadline: float
    timeout_seconds: float
    future: Future[Message] = field(default_factory=Future)
    num_bytes: int = 0
    num_copies: int = 0
    first_sent: int = -1
    """Place of the first copy among all messages that the connection sent."""
    last_sent: int = -1
    sent_at: float = 0.0
    """Time of the first copy."""
    due: float = 0.0
    """Time of the next copy; infinite while the last copy is still in this process."""
    left: Callable[[], bool] | None = None
    """Tells whether the last copy has left this process; None: it has."""

    def __post_init__(self) -> None:
        self.num_bytes = sum(len(frame) for frame in self.frames)

    @property
    def is_large(self) -> bool:
        """Whether the request counts in the window."""
        return self.num_bytes >= LARGE_BYTES


class Outbox:
    """The unanswered requests of a connection. Not thread-safe.

    Args:
        resend_seconds: time from a copy to the second one.
    """

    def __init__(self, resend_seconds: float) -> None:
        self._resend_seconds, self._window_bytes = resend_seconds, FIRST_WINDOW_BYTES
        self._requests: dict[int, Request] = {}
        self._num_sent = 0
        self._large_seconds = 0.0
        """Longest time that a large request took lately, from its first copy to its answer."""

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._requests.values()))

    def add(self, request: Request) -> None:
        """Add a new request, which is due at once."""
        self._requests[request.number] = request

    def get(self, number: int) -> Request | None:
        """Return the unanswered request with `number`."""
        return self._requests.get(number)

    def remove(self, request: Request) -> None:
        """Forget a request that was cancelled or has expired."""
        self._requests.pop(request.number, None)

    def answered(self, request: Request, now: float) -> None:
        """Remove an answered request. Earlier ones that should have been answered before it are due at once."""
        self.remove(request)
        if request.is_large:
            seconds = now - request.sent_at
            self._large_seconds = max(seconds, 0.75 * self._large_seconds)
            if seconds > SOON_SECONDS:
                self._window_bytes //= 2
            else:
                self._window_bytes = min(self._window_bytes + request.num_bytes, LARGEST_WINDOW_BYTES)
        for other in self._requests.values():
            if other.kind == IN_ORDER and 0 <= other.last_sent < request.first_sent:
                other.due, other.left = now, None

    def disconnected(self, now: float) -> None:
        """All copies on their way are lost: every request is due."""
        for request in self._requests.values():
            request.due, request.left, request.num_copies = now, None, 0

    def postpone(self, seconds: float) -> None:
        """Add time during which this process did not run, so that answers that arrived meanwhile are read first."""
        for request in self._requests.values():
            if request.num_copies:
                request.due += seconds

    def to_send(self, now: float) -> list[Request]:
        """Return the requests to send now, small ones first. Call `sent` for each that was sent."""
        self._start_clocks(now)
        due = [request for request in self._requests.values() if request.due <= now]
        small = [request for request in due if not request.is_large]
        # A copy that is due again is no longer on its way.
        in_flight = sum(r.num_bytes for r in self._requests.values() if r.is_large and r.num_copies and r.due > now)
        large = []
        for request in due:
            if request.is_large:
                if in_flight and in_flight >= self._window_bytes:
                    break
                in_flight += request.num_bytes
                large.append(request)
        return small + large

    def sent(self, request: Request, now: float, left: Callable[[], bool] | None = None) -> None:
        """Note that a copy was given to the socket. `left` tells when it has left this process; None: it has."""
        if not request.num_copies:
            request.sent_at = now
        if request.first_sent < 0:
            request.first_sent = self._num_sent
        request.last_sent = self._num_sent
        self._num_sent += 1
        request.num_copies += 1
        request.left = left
        request.due = math.inf if left is not None else now + self._patience(request)

    def is_leaving(self) -> bool:
        """Whether a copy is still in this process, waiting for the link."""
        return any(request.left is not None for request in self._requests.values())

    def next_due(self, now: float) -> float:
        """Return the time until which `to_send` has nothing new, if nothing is added, answered or leaves."""
        # A large request that waits for the window is due already, and an answer makes room for it.
        return min((r.due for r in self._requests.values() if r.due > now), default=math.inf)

    def _start_clocks(self, now: float) -> None:
        for request in self._requests.values():
            if request.left is not None and request.left():
                request.left, request.due = None, now + self._patience(request)

    def _patience(self, request: Request) -> float:
        seconds = max(self._resend_seconds, 2 * self._large_seconds if request.is_large else 0.0)
        return seconds * 2.0 ** min(request.num_copies - 1, MAX_DOUBLINGS)
