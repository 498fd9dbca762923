"""The processes that an actor's name stood for: the newest one counts, all earlier ones are refused.

Owned by `buffer/service/leases.py`, written inside the ledger's transactions. A connection's identity is unique per
process. The process that was first heard last is the newest. The order is stored in the ledger's file, so that a
process that thaws after a restart of the buffer does not pass for a new one. The oldest entries are forgotten; a
forgotten process that is still there counts as new.
"""

from __future__ import annotations

from buffer.ledger.ledger_file import LedgerFile

MOST_REMEMBERED = 20_000
"""Processes in the table: several for every actor of the largest runs."""


class Incarnations:
    """The table `incarnations`: one row per process, in the order in which they were first heard."""

    def __init__(self, file: LedgerFile) -> None:
        self._file = file
        self._load()

    def _load(self) -> None:
        self._actors: dict[str, str] = {}
        """Actor by process, oldest process first."""
        self._newest: dict[str, str] = {}
        """Newest process by actor."""
        rows = self._file.rows("SELECT number, process, actor_id FROM incarnations ORDER BY number")
        for _, process, actor_id in rows:
            self._actors[process] = actor_id
            self._newest[actor_id] = process
        self._next = rows[-1][0] + 1 if rows else 0

    def is_replaced(self, process: str) -> bool:
        """Return whether a newer process has taken the name over."""
        actor_id = self._actors.get(process)
        # The name has no newest process when that one went on under another name, as no correct process does.
        return actor_id is not None and self._newest.get(actor_id, process) != process

    def hear(self, process: str, actor_id: str) -> str | None:
        """Note that the process works under the name. A process that is not known takes the name over.

        Returns:
            The process that is replaced now; None: there is none.
        """
        if self._actors.get(process) == actor_id:
            return None
        self._file.on_undo(self._load)
        self._remove(process)
        self._file.write("INSERT INTO incarnations VALUES (?, ?, ?)", self._next, process, actor_id)
        self._next += 1
        replaced = self._newest.get(actor_id)
        self._actors[process], self._newest[actor_id] = actor_id, process
        if len(self._actors) > MOST_REMEMBERED:
            self._remove(next(iter(self._actors)))
        return replaced

    def _remove(self, process: str) -> None:
        actor_id = self._actors.pop(process, None)
        if actor_id is not None:
            self._file.write("DELETE FROM incarnations WHERE process = ?", process)
            if self._newest.get(actor_id) == process:
                del self._newest[actor_id]
