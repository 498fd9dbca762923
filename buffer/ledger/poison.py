"""Groups on which the learner failed: after the second failure they are set aside, so that the run goes on.

Owned by `buffer/ledger/ledger.py`, written inside its transactions. Only an error that was raised while a batch was
trained on counts, as the learner's next process reports it in its hello (`learner/monitoring/failed_batch.py`). A
learner that was killed, was stopped or lost a connection has no such report, so none of these costs a group.
"""

from __future__ import annotations

import json
from collections.abc import Collection

from buffer.ledger.ledger_file import LedgerFile

REASON = "poison"
"""Name of these groups in the ledger."""
FAILURES = 2
"""Failures on a group after which it is set aside."""


class Poison:
    """Counts, by occurrence, the failures of the learner while it trained on the occurrence's group."""

    def __init__(self, file: LedgerFile) -> None:
        self._file = file

    def failed(self, policy_version: int, group_ids: Collection[str], failure_id: str) -> list[int]:
        """Count a failure on groups of the batch for `policy_version`, before that batch is undone.

        Args:
            policy_version: the batch's.
            group_ids: those that the failed rank trained on.
            failure_id: a failure that was counted before changes nothing.

        Returns:
            The occurrences of those that failed at least `FAILURES` times.
        """
        if not failure_id or self._file.meta("failure_id", "") == failure_id:
            return []
        self._file.set_meta("failure_id", failure_id)
        rows = self._file.rows(
            "SELECT occurrence, occurrence || '.' || attempt FROM uses CROSS JOIN occurrences USING (occurrence)"
            " WHERE used_version = ? AND state = 'used'",
            policy_version,
        )
        named = set(group_ids)
        before = json.loads(self._file.meta("failures", "{}"))
        # A group without another failure since was trained on, or was not in the batch that failed.
        counts = {occurrence: before.get(str(occurrence), 0) + 1 for occurrence, group_id in rows if group_id in named}
        self._file.set_meta("failures", json.dumps(counts))
        return [occurrence for occurrence, number in counts.items() if number >= FAILURES]
