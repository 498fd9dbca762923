"""Groups nothing can be learned from: all rewards equal. Dropped if told so, and too many in a row end the run.

Owned by `buffer/ledger/ledger.py`, written inside its transactions. Once the run is to end this stays so until the
learner starts anew, whatever is still delivered: every rank of the learner must be told the same.
"""

from __future__ import annotations

from buffer.config import BufferConfig
from buffer.ledger.ledger_file import LedgerFile
from buffer.transport.packed_group import GroupHeader

REASON = "no_signal"


class ZeroAdvantageGroups:
    """Counts them. Call `load` before anything else, and when a transaction was undone."""

    def __init__(self, config: BufferConfig, file: LedgerFile) -> None:
        self._config, self._file = config, file

    def load(self) -> None:
        """Read what the file knows."""
        self._in_a_row: int = self._file.meta("no_signal_in_a_row", 0)
        self._solved: int = self._file.meta("no_signal_solved", 0)

    def drops(self, header: GroupHeader) -> bool:
        """A group is delivered: whether it is to be dropped."""
        if not self._config.drop_no_signal:
            return False
        has_none = min(header.rewards) == max(header.rewards)
        if self.stop_reason is None:
            solved = has_none and header.num_correct == len(header.rewards)
            self._set(self._in_a_row + 1 if has_none else 0, self._solved + solved if has_none else 0)
        return has_none

    @property
    def stop_reason(self) -> str | None:
        """One sentence why the run must not go on; None when it may."""
        if not self._config.max_no_signal or self._in_a_row < self._config.max_no_signal:
            return None
        return (
            f"{self._in_a_row} groups in a row were dropped as {REASON} (buffer.max_no_signal): the rewards of each"
            f" were all equal, and in {self._solved} of them every completion was correct; change the level of the"
            " task's prompts or its rewards, raise samples_per_group or temperature, or train on such groups too with"
            " buffer.drop_no_signal=false"
        )

    def begin_anew(self) -> None:
        """The learner starts: the count begins at 0."""
        self._set(0, 0)

    def _set(self, in_a_row: int, solved: int) -> None:
        if (in_a_row, solved) != (self._in_a_row, self._solved):
            self._in_a_row, self._solved = in_a_row, solved
            self._file.set_meta("no_signal_in_a_row", in_a_row)
            self._file.set_meta("no_signal_solved", solved)
