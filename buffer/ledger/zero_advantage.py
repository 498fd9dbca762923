"""Zero-advantage groups: all rewards are equal, so the learner can learn nothing from them.

Owned by `buffer/ledger/ledger.py`, written inside its transactions. With buffer.drop_no_signal such groups are dropped
on delivery, and buffer.max_no_signal consecutive ones end the run. The decision to end the run holds until the learner
starts again, because every rank must get the same answer.
"""

from __future__ import annotations

from buffer.config import BufferConfig
from buffer.ledger.ledger_file import LedgerFile
from buffer.transport.packed_group import GroupHeader

REASON = "no_signal"
"""Name of these groups in the ledger, in settings and in metrics."""


class ZeroAdvantageGroups:
    """Counts zero-advantage groups. Call `load` first, and after a transaction was rolled back."""

    def __init__(self, config: BufferConfig, file: LedgerFile) -> None:
        self._config, self._file = config, file

    def load(self) -> None:
        """Read the counts from the file."""
        self._in_a_row: int = self._file.meta("no_signal_in_a_row", 0)
        self._solved: int = self._file.meta("no_signal_solved", 0)

    def drops(self, header: GroupHeader) -> bool:
        """Count a delivered group. Returns True when the group must be dropped."""
        if not self._config.drop_no_signal:
            return False
        all_equal = min(header.rewards) == max(header.rewards)
        if self.stop_reason is None:
            solved = all_equal and header.num_correct == len(header.rewards)
            self._set(self._in_a_row + 1 if all_equal else 0, self._solved + solved if all_equal else 0)
        return all_equal

    @property
    def stop_reason(self) -> str | None:
        """Why the run must end, in one sentence; None when it may go on."""
        if not self._config.max_no_signal or self._in_a_row < self._config.max_no_signal:
            return None
        return (
            f"{self._in_a_row} groups in a row were dropped as {REASON} (buffer.max_no_signal): the rewards of each"
            f" were all equal, and in {self._solved} of them every completion was correct; change the level of the"
            " task's prompts or its rewards, raise samples_per_group or temperature, or train on such groups too with"
            " buffer.drop_no_signal=false"
        )

    def reset(self) -> None:
        """Count from 0 again, because the learner starts."""
        self._set(0, 0)

    def _set(self, in_a_row: int, solved: int) -> None:
        if (in_a_row, solved) != (self._in_a_row, self._solved):
            self._in_a_row, self._solved = in_a_row, solved
            self._file.set_meta("no_signal_in_a_row", in_a_row)
            self._file.set_meta("no_signal_solved", solved)
