"""Held-out evaluations: the requests, the actors that run them, and their reports.

Owned by `buffer/ledger/ledger.py`, written inside its transactions. An evaluation's states are
pending -> running -> reported. It becomes pending again when its actor falls silent or no longer says that it works on
the evaluation. Only its first report is stored.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class _Run:
    """The lease request that an evaluation was assigned to."""

    holder: str
    request_number: int


class Evaluations:
    """The table `evaluations`, by requested version. Call `load` first, and after a transaction was rolled back."""

    def __init__(self, file: LedgerFile) -> None:
        self._file = file
        self._unfinished: dict[int, _Run | None] = {}
        """The evaluations without a report, oldest first; None: pending."""

    def load(self) -> None:
        """Read the evaluations without a report from the file."""
        sql = "SELECT requested_version, state, holder, request_number FROM evaluations WHERE state != 'reported'"
        self._unfinished = {
            version: _Run(holder, number) if state == "running" else None
            for version, state, holder, number in self._file.rows(sql + " ORDER BY requested_version")
        }

    @property
    def oldest_pending(self) -> int | None:
        """The oldest version whose evaluation no actor runs; None: there is none."""
        return next((version for version, run in self._unfinished.items() if run is None), None)

    @property
    def num_unfinished(self) -> int:
        """Number of evaluations without a report."""
        return len(self._unfinished)

    def request(self, version: int) -> None:
        """Add a pending evaluation of `version`. A repeated call changes nothing."""
        sql = "INSERT OR IGNORE INTO evaluations (requested_version, state) VALUES (?, 'pending')"
        if self._file.write(sql, version):
            self._unfinished[version] = None
            self._unfinished = dict(sorted(self._unfinished.items()))

    def assign(self, version: int, holder: str, request_number: int) -> None:
        """Assign the pending evaluation of `version` to a lease request of `holder`."""
        self._file.write(
            "UPDATE evaluations SET state = 'running', holder = ?, request_number = ? WHERE requested_version = ?",
            holder,
            request_number,
            version,
        )
        self._unfinished[version] = _Run(holder, request_number)

    def taken(self, holder: str, request_number: int) -> int:
        """Return the running evaluation that this lease request was assigned; -1 when there is none."""
        run = _Run(holder, request_number)
        return next((version for version, known in self._unfinished.items() if known == run), -1)

    def report(self, report: EvaluationReport, holder: str) -> bool:
        """Store a report. Returns False when `holder` does not run the evaluation, or no longer."""
        run = self._unfinished.get(report.requested_version)
        if run is None or run.holder != holder:
            return False
        del self._unfinished[report.requested_version]
        self._file.write(
            "UPDATE evaluations SET state = 'reported', report = ? WHERE requested_version = ?",
            encode(report, 0, "")[0],
            report.requested_version,
        )
        return True

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

    def holders(self) -> set[str]:
        """Return the names of the holders that run evaluations."""
        return {run.holder for run in self._unfinished.values() if run is not None}

    def newest_request(self, holder: str) -> int:
        """Return the newest lease request of the holder that was assigned a running evaluation; -1: none."""
        runs = (run for run in self._unfinished.values() if run is not None)
        return max((run.request_number for run in runs if run.holder == holder), default=-1)

    def release(self, holder: str, before: int | None = None, kept: Collection[int] = ()) -> int:
        """Make evaluations of a holder pending again. Returns their number.

        Args:
            holder: name of the holder.
            before: only those assigned to lease requests before this number.
            kept: versions that stay assigned.
        """
        ended = [
            version
            for version, run in self._unfinished.items()
            if run is not None
            and run.holder == holder
            and (before is None or run.request_number < before)
            and version not in kept
        ]
        for version in ended:
            self._file.write("UPDATE evaluations SET state = 'pending' WHERE requested_version = ?", version)
            self._unfinished[version] = None
        return len(ended)

    def roll_back(self, version: int) -> None:
        """Delete the evaluations of versions above `version`, because the learner will compute those versions again."""
        self._file.write("DELETE FROM evaluations WHERE requested_version > ?", version)
        self._unfinished = {known: run for known, run in self._unfinished.items() if known <= version}
