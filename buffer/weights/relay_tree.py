"""Which relays live, on which hosts, and who pulls from whom."""

from __future__ import annotations

HELLO_SECONDS = 5.0
SILENT_SECONDS = 4 * HELLO_SECONDS
"""Silence after which a relay is not there any more."""


class RelayTree:
    """One relay per host, in the order in which they came; a relay's parent is always older than itself.

    Args:
        fanout: relays that pull from the root, and from each relay; 0: all of them from the root.
    """

    def __init__(self, fanout: int) -> None:
        self._fanout = fanout
        self._relays: dict[str, tuple[str, float]] = {}
        """(address, when it was last heard) by host."""

    def hear(self, host_id: str, address: str, now: float) -> str:
        """A sign of life. Returns the address of the relay's parent; empty: the root."""
        self._discard_silent(now)
        self._relays[host_id] = (address, now)
        place = list(self._relays).index(host_id)
        if not self._fanout or place < self._fanout:
            return ""
        return list(self._relays.values())[place // self._fanout - 1][0]

    def at(self, host_id: str, now: float) -> str:
        """The address of the living relay on a host; empty: there is none."""
        self._discard_silent(now)
        return self._relays.get(host_id, ("", now))[0]

    def _discard_silent(self, now: float) -> None:
        self._relays = {host: relay for host, relay in self._relays.items() if now - relay[1] < SILENT_SECONDS}
