"""The tree of relays: which relays are alive, on which hosts, and from where each pulls."""

from __future__ import annotations

HELLO_SECONDS = 5.0
SILENT_SECONDS = 4 * HELLO_SECONDS
"""Silence after which a relay is considered dead."""


class RelayTree:
    """The relays in the order in which they registered, one per host. A relay's parent registered before the relay.

    The root of the tree is the learner's weight server.

    Args:
        fanout: number of relays that pull from the root, and number that pull from each relay; 0: all pull from the
            root.
    """

    def __init__(self, fanout: int) -> None:
        self._fanout = fanout
        self._relays: dict[str, tuple[str, float]] = {}
        """(address, time of the last heartbeat) by host."""

    def hear(self, host_id: str, address: str, now: float) -> str:
        """Register a relay's heartbeat. Returns the address of the relay's parent; empty: the root."""
        self._discard_silent(now)
        self._relays[host_id] = (address, now)
        place = list(self._relays).index(host_id)
        if not self._fanout or place < self._fanout:
            return ""
        return list(self._relays.values())[place // self._fanout - 1][0]

    def at(self, host_id: str, now: float) -> str:
        """Return the address of the relay on a host; empty: the host has no living relay."""
        self._discard_silent(now)
        return self._relays.get(host_id, ("", now))[0]

    def _discard_silent(self, now: float) -> None:
        self._relays = {host: relay for host, relay in self._relays.items() if now - relay[1] < SILENT_SECONDS}
