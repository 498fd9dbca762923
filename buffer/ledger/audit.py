"""Reads a run's ledger from another process, also while the buffer writes to it, and checks its invariants.

Used by `python -m buffer inspect`, by the launcher's summary and by tests. One transaction reads everything, so the
results are one consistent snapshot.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from buffer.ledger.ledger_file import FILE_NAME, SCHEMA_VERSION
from buffer.ledger.states import STATES

KEPT_STATES = tuple(state for state in STATES if state != "dropped")

_BROKEN_RULES = {
    "used or done groups that were in no batch": (
        "SELECT COUNT(*) FROM occurrences WHERE state IN ('used', 'done')"
        " AND occurrence NOT IN (SELECT occurrence FROM uses)"
    ),
    "places in a batch of groups that are neither used nor done": (
        "SELECT COUNT(*) FROM uses WHERE occurrence NOT IN"
        " (SELECT occurrence FROM occurrences WHERE state IN ('used', 'done'))"
    ),
    "ready or used groups without contents": (
        "SELECT COUNT(*) FROM occurrences WHERE state IN ('ready', 'used')"
        " AND occurrence NOT IN (SELECT occurrence FROM payloads)"
    ),
    "contents without a ready or used group": (
        "SELECT COUNT(*) FROM payloads WHERE occurrence NOT IN"
        " (SELECT occurrence FROM occurrences WHERE state IN ('ready', 'used'))"
    ),
    "states whose stored number of occurrences is wrong": (
        "SELECT COUNT(*) FROM (SELECT name FROM (SELECT iif(state = 'dropped', 'dropped:' || reason, state) AS name,"
        " COUNT(*) AS number FROM occurrences GROUP BY name UNION ALL SELECT name, -value FROM state_counts)"
        " GROUP BY name HAVING SUM(number) != 0)"
    ),
    "batches with an empty place": (
        "SELECT COUNT(*) FROM (SELECT 1 FROM uses GROUP BY used_version HAVING COUNT(*) != MAX(batch_order) + 1)"
    ),
    "occurrences beyond the number issued": (
        "SELECT COUNT(*) FROM occurrences WHERE occurrence < 0"
        " OR occurrence >= COALESCE((SELECT value FROM meta WHERE key = 'issued'), 0)"
    ),
    "prompts drawn twice in the current epoch": (
        "SELECT COUNT(*) - COUNT(DISTINCT prompt_id) FROM occurrences WHERE occurrence >="
        " (SELECT epoch_first_occurrence FROM stages ORDER BY stage DESC LIMIT 1)"
    ),
}

_STAGES = (
    "SELECT stage, first_occurrence, policy_version, began_at, success_before, groups_before, epoch, num_passed_over"
    " FROM stages ORDER BY stage"
)


@dataclass(frozen=True, slots=True)
class StageRow:
    """A stage of the curriculum that has begun."""

    stage: int
    """Counted from 1."""
    first_occurrence: int
    policy_version: int
    """Version of the next batch when the stage began."""
    began_at: float
    """Unix time in seconds."""
    success_before: float
    """Share of correct completions at the end of the previous stage, over `groups_before` groups."""
    groups_before: int
    epoch: int
    """Number of completed passes over the stage's prompts."""
    num_passed_over: int
    """Prompts that the difficulty filter leaves out of the current epoch."""


@dataclass(frozen=True, slots=True)
class Audit:
    """One snapshot of a ledger."""

    issued: int
    counts: dict[str, int]
    """Occurrences by state."""
    dropped: dict[str, int]
    """Dropped occurrences by reason."""
    counters: dict[str, int]
    """Counters by name: late, duplicate and unknown deliveries, reissued and rolled back groups, and others."""
    evaluations: dict[str, int]
    """Evaluations by state."""
    stages: tuple[StageRow, ...]
    """The stages that have begun, oldest first."""
    policy_version: int
    uses: int
    """Places in all batches. With max_uses above 1 a group may have several."""
    staleness_max: int
    """Highest staleness of any use; 0 without uses."""
    staleness_mean: float
    """Mean staleness over all uses; 0 without uses."""
    problems: tuple[str, ...]
    """Broken invariants; empty when all hold."""

    @property
    def holds(self) -> bool:
        """Whether all invariants hold, first of all issued = pending + leased + ready + used + done + dropped."""
        return not self.problems


def audit(run_dir: str | Path) -> Audit:
    """Read and check the ledger in `run_dir`.

    Raises:
        ValueError: when there is no ledger, or the file is not a ledger of this schema.
    """
    path = Path(run_dir) / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the directory of a run that was started")
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)) as db:
            db.execute("BEGIN")
            return _audit(db, path)
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} cannot be read as a ledger: {error}") from error


def _audit(db: sqlite3.Connection, path: Path) -> Audit:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has ledger schema {version}, this program reads {SCHEMA_VERSION}; use the program that wrote it"
        )
    meta = dict(db.execute("SELECT key, value FROM meta"))
    issued = meta.get("issued", 0)
    counts = dict.fromkeys(KEPT_STATES, 0)
    counts |= dict(db.execute("SELECT state, COUNT(*) FROM occurrences WHERE state != 'dropped' GROUP BY state"))
    dropped = dict(db.execute("SELECT reason, COUNT(*) FROM occurrences WHERE state = 'dropped' GROUP BY reason"))
    total = sum(counts.values()) + sum(dropped.values())
    problems = [] if issued == total else [f"{issued} occurrences were issued, the states hold {total}"]
    for rule, sql in _BROKEN_RULES.items():
        number = db.execute(sql).fetchone()[0]
        if number:
            problems.append(f"{number} {rule}")
    uses, highest, mean = db.execute(
        "SELECT COUNT(*), MAX(used_version - oldest_version), AVG(used_version - oldest_version)"
        " FROM uses CROSS JOIN occurrences USING (occurrence)"
    ).fetchone()
    return Audit(
        issued=issued,
        counts=counts,
        dropped=dropped,
        counters=dict(db.execute("SELECT name, value FROM counters ORDER BY name")),
        evaluations=dict(db.execute("SELECT state, COUNT(*) FROM evaluations GROUP BY state")),
        stages=tuple(StageRow(*row) for row in db.execute(_STAGES)),
        policy_version=meta.get("policy_version", 0),
        uses=uses,
        staleness_max=highest or 0,
        staleness_mean=mean or 0.0,
        problems=tuple(problems),
    )
