"""The run's progress as the buffer knows it: three values, stored in the ledger's file."""

from __future__ import annotations

from buffer.ledger.ledger_file import LedgerFile


class Progress:
    """Read the fields; change them with `set`, inside a transaction of the ledger."""

    def __init__(self, file: LedgerFile) -> None:
        self._file = file
        self.next_version: int = file.meta("next_version", 0)
        """Policy version that the next batch is for."""
        self.policy_version: int = file.meta("policy_version", 0)
        """The learner's newest version."""
        self.closing: bool = bool(file.meta("closing", 0))
        """Whether the learner needs no more groups."""

    def set(
        self, *, next_version: int | None = None, policy_version: int | None = None, closing: bool | None = None
    ) -> None:
        """Change and store the given values. They return to the former ones if the transaction is undone."""
        for name in ("next_version", "policy_version", "closing"):
            self._file.guard(self.__dict__, name)
        if next_version is not None:
            self.next_version = next_version
            self._file.set_meta("next_version", next_version)
        if policy_version is not None:
            self.policy_version = policy_version
            self._file.set_meta("policy_version", policy_version)
        if closing is not None:
            self.closing = closing
            self._file.set_meta("closing", int(closing))
