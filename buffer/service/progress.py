"""The run's progress as the buffer knows it: a few values, stored in the ledger's file."""

from __future__ import annotations

from buffer.ledger.ledger_file import LedgerFile


class Progress:
    """Read the fields; change them with `set` and `begin_epoch`, inside a transaction of the ledger.

    If the transaction is undone, the fields return to their former values.
    """

    def __init__(self, file: LedgerFile) -> None:
        self._file = file
        self.next_version: int = file.meta("next_version", 0)
        """Policy version that the next batch is for. The learner is never ahead of it."""
        self.policy_version: int = file.meta("policy_version", 0)
        """The learner's newest version."""
        self.newest_version: int = file.meta("newest_version", max(self.next_version, self.policy_version))
        """The highest `next_version` so far. A rollback of the learner does not lower it."""
        self.closing: bool = bool(file.meta("closing", 0))
        """Whether the learner needs no more groups."""
        self.epoch: int = file.meta("epoch", 0)
        """Number of the current learner, as in `LearnerWelcome`; 0: none has said hello."""

    def set(
        self, *, next_version: int | None = None, policy_version: int | None = None, closing: bool | None = None
    ) -> None:
        """Change and store the given values."""
        if next_version is not None:
            self._store("next_version", next_version)
            if next_version > self.newest_version:
                self._store("newest_version", next_version)
        if policy_version is not None:
            self._store("policy_version", policy_version)
        if closing is not None:
            self._store("closing", closing)

    def begin_epoch(self) -> None:
        """A learner starts. All messages of earlier learners are refused from now on."""
        self._store("epoch", self.epoch + 1)

    def _store(self, name: str, value: int) -> None:
        self._file.guard(self.__dict__, name)
        self.__dict__[name] = value
        self._file.set_meta(name, int(value))
