"""Which held-out evaluations were asked for, who runs them, and what they reported.

A table of the ledger's file, with states pending -> running -> reported; written inside the ledger's transactions.
An evaluation whose actor falls silent becomes pending again; a report counts once.
"""

from __future__ import annotations

from buffer.ledger.ledger_file import LedgerFile
from buffer.transport.messages import EvaluationReport, decode, encode


class Evaluations:
    """The evaluations of one run, keyed by the version they were asked for."""

    def __init__(self, file: LedgerFile) -> None:
        self._file = file

    def request(self, version: int) -> None:
        """Ask for an evaluation of `version`; asking again changes nothing."""
        self._file.write("INSERT OR IGNORE INTO evaluations (requested_version, state) VALUES (?, 'pending')", version)

    def take(self, policy_version: int, holder: str, request_number: int) -> int:
        """Hand the oldest pending evaluation that an actor at `policy_version` can run to it; -1 when there is none."""
        version = self._file.one(
            "SELECT MIN(requested_version) FROM evaluations WHERE state = 'pending' AND requested_version <= ?",
            policy_version,
        )
        if version is None:
            return -1
        self._file.write(
            "UPDATE evaluations SET state = 'running', holder = ?, request_number = ? WHERE requested_version = ?",
            holder,
            request_number,
            version,
        )
        return int(version)

    def taken(self, holder: str, request_number: int) -> int:
        """The running evaluation that this very request was given; -1 when it was given none."""
        version = self._file.one(
            "SELECT requested_version FROM evaluations WHERE state = 'running' AND holder = ? AND request_number = ?",
            holder,
            request_number,
        )
        return -1 if version is None else int(version)

    def report(self, report: EvaluationReport) -> bool:
        """Store a report; False when nobody waits for it, because it is known or its version was rolled back."""
        return bool(
            self._file.write(
                "UPDATE evaluations SET state = 'reported', report = ?"
                " WHERE requested_version = ? AND state != 'reported'",
                encode(report, 0, "")[0],
                report.requested_version,
            )
        )

    def reports(self, since_version: int = 0) -> tuple[EvaluationReport, ...]:
        """Reports with requested_version >= `since_version`, oldest first."""
        rows = self._file.rows(
            "SELECT report FROM evaluations WHERE state = 'reported' AND requested_version >= ?"
            " ORDER BY requested_version",
            since_version,
        )
        messages = (decode([row[0]], "")[0] for row in rows)
        return tuple(message for message in messages if isinstance(message, EvaluationReport))

    def num_unfinished(self) -> int:
        """Evaluations asked for and not reported."""
        return int(self._file.one("SELECT COUNT(*) FROM evaluations WHERE state != 'reported'"))

    def holders(self) -> set[str]:
        """Who runs evaluations."""
        return {row[0] for row in self._file.rows("SELECT DISTINCT holder FROM evaluations WHERE state = 'running'")}

    def release(self, holder: str) -> int:
        """Make the evaluations of a silent holder pending again; returns their number."""
        return self._file.write(
            "UPDATE evaluations SET state = 'pending' WHERE state = 'running' AND holder = ?", holder
        )

    def roll_back(self, version: int) -> None:
        """Forget the evaluations of versions above `version`: the learner will make those anew."""
        self._file.write("DELETE FROM evaluations WHERE requested_version > ?", version)
