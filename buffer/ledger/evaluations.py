"""Held-out evaluations: the requests, the actors that run them, and their reports.

Owned by `buffer/ledger/ledger.py`, written inside its transactions. An evaluation's states are
pending -> running -> reported. It becomes pending again when its actor falls silent. Only its first report is stored.
"""

from __future__ import annotations

import functools

import msgpack

from buffer.ledger.ledger_file import LedgerFile
from buffer.transport.messages import SCHEMA, EvaluationReport, decode, encode
from buffer.transport.schema import unpack_header


@functools.lru_cache(4096)
def _decoded(frame: bytes) -> EvaluationReport:
    """Decode a stored report. An older release wrote it under its own schema, with the same fields."""
    _, *rest = unpack_header(frame)
    report, _ = decode([msgpack.packb([SCHEMA, *rest], use_bin_type=True)], "")
    assert isinstance(report, EvaluationReport)
    return report


class Evaluations:
    """The table `evaluations`, by requested version."""

    def __init__(self, file: LedgerFile) -> None:
        self._file = file

    def request(self, version: int) -> None:
        """Add a pending evaluation of `version`. A repeated call changes nothing."""
        self._file.write("INSERT OR IGNORE INTO evaluations (requested_version, state) VALUES (?, 'pending')", version)

    def take(self, policy_version: int, holder: str, request_number: int) -> int:
        """Assign the oldest pending evaluation up to `policy_version` to `holder`. Returns its version; -1: none."""
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
        """Return the running evaluation that this lease request was assigned; -1 when there is none."""
        version = self._file.one(
            "SELECT requested_version FROM evaluations WHERE state = 'running' AND holder = ? AND request_number = ?",
            holder,
            request_number,
        )
        return -1 if version is None else int(version)

    def report(self, report: EvaluationReport) -> bool:
        """Store a report. Returns False when the evaluation is already reported or was rolled back."""
        return bool(
            self._file.write(
                "UPDATE evaluations SET state = 'reported', report = ?"
                " WHERE requested_version = ? AND state != 'reported'",
                encode(report, 0, "")[0],
                report.requested_version,
            )
        )

    def reports(self, since_version: int = 0) -> tuple[EvaluationReport, ...]:
        """Return the reports with requested_version >= `since_version`, oldest first."""
        rows = self._file.rows(
            "SELECT report FROM evaluations WHERE state = 'reported' AND requested_version >= ?"
            " ORDER BY requested_version",
            since_version,
        )
        return tuple(_decoded(row[0]) for row in rows)

    def latest(self, number: int) -> tuple[EvaluationReport, ...]:
        """Return the first report and the latest ones, at most `number` in all, oldest first."""
        sql = "SELECT report FROM evaluations WHERE state = 'reported' ORDER BY requested_version"
        rows = self._file.rows(f"{sql} DESC LIMIT ?", number)
        if len(rows) == number:
            rows[-1:] = self._file.rows(f"{sql} LIMIT 1")
        return tuple(_decoded(row[0]) for row in reversed(rows))

    def num_unfinished(self) -> int:
        """Return the number of evaluations without a report."""
        return int(self._file.one("SELECT COUNT(*) FROM evaluations WHERE state != 'reported'"))

    def holders(self) -> set[str]:
        """Return the names of the holders that run evaluations."""
        return {row[0] for row in self._file.rows("SELECT DISTINCT holder FROM evaluations WHERE state = 'running'")}

    def release(self, holder: str) -> int:
        """Make the evaluations of a holder pending again. Returns their number."""
        return self._file.write(
            "UPDATE evaluations SET state = 'pending' WHERE state = 'running' AND holder = ?", holder
        )

    def roll_back(self, version: int) -> None:
        """Delete the evaluations of versions above `version`, because the learner will compute those versions again."""
        self._file.write("DELETE FROM evaluations WHERE requested_version > ?", version)
