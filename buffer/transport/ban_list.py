"""Peers that send invalid messages: each is logged at most once a minute, and ignored for a while if it sends more.

Owned by `buffer/transport/router.py`. `now` is seconds of a monotonic clock. Memory is bounded, even when a peer
connects under ever new names.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass

log = logging.getLogger(__name__)

MAX_PEERS = 1_000
"""Peers remembered. The peer whose last invalid message is the oldest is forgotten first."""
BAD_MESSAGES = 20
"""Invalid messages within `WINDOW_SECONDS` after which a peer is ignored for `IGNORED_SECONDS`."""
WINDOW_SECONDS = 60.0
IGNORED_SECONDS = 30.0
LINES_PER_WINDOW = 100
"""Log lines within `WINDOW_SECONDS`, over all peers."""


@dataclass(slots=True)
class _Offender:
    since: float
    num_bad: int = 0
    ignored_until: float = 0.0


class BanList:
    """Counts the invalid messages of each peer."""

    def __init__(self) -> None:
        self._peers: OrderedDict[bytes, _Offender] = OrderedDict()
        self._lines_since = 0.0
        self._num_lines = 0

    def is_ignored(self, identity: bytes, now: float) -> bool:
        """Return whether to drop this peer's messages unread."""
        peer = self._peers.get(identity)
        return peer is not None and now < peer.ignored_until

    def note(self, identity: bytes, complaint: Exception, now: float) -> None:
        """Count an invalid message; `complaint` says what is wrong with it."""
        peer = self._peers.get(identity)
        if peer is None or now - peer.since >= WINDOW_SECONDS:
            peer = self._peers[identity] = _Offender(now)
            self._say(now, "message of %s dropped: %s", _text(identity), complaint)
        self._peers.move_to_end(identity)
        peer.num_bad += 1
        if peer.num_bad >= BAD_MESSAGES:
            peer.num_bad, peer.ignored_until = 0, now + IGNORED_SECONDS
            self._say(now, "%s keeps sending invalid messages: ignored for %.0f s", _text(identity), IGNORED_SECONDS)
        if len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)

    def _say(self, now: float, text: str, *values: object) -> None:
        if now - self._lines_since >= WINDOW_SECONDS:
            self._lines_since, self._num_lines = now, 0
        self._num_lines += 1
        if self._num_lines <= LINES_PER_WINDOW:
            log.warning(text, *values)


def _text(identity: bytes) -> str:
    """Return a peer's name for the log: shortened, on one line, without control characters."""
    return repr(identity[:80])[2:-1]
