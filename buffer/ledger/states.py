"""The state machine of a prompt occurrence: its states and all allowed transitions; and the tables that hold it.

Triggers made from the transitions let SQLite itself refuse any other change. Used by `buffer/ledger/ledger_file.py`.
"""

from __future__ import annotations

STATES = ("pending", "leased", "ready", "used", "done", "dropped")
FIRST_STATE = "leased"
"""A new occurrence is created when an actor leases it."""

TRANSITIONS = {
    ("pending", "leased"): "an actor requests a lease, and admission has room",
    ("leased", "ready"): "the group is delivered",
    ("leased", "pending"): "the actor is silent, restarts or returns the lease, or the delivered group is too stale",
    (
        "leased",
        "dropped",
    ): "the lease is returned with a reason, or the group has zero advantage, is too stale or invalid",
    ("ready", "pending"): "the group has become too stale; its prompt will be sampled again",
    ("ready", "dropped"): "the group has become too stale, and buffer.max_reissues is exceeded; or it is poison",
    ("ready", "used"): "the group is in a batch for the first time",
    ("used", "done"): "a checkpoint with the group's effect is committed, and no later batch can use the group",
    ("used", "ready"): "the learner was rolled back to an older version",
    ("done", "pending"): "the learner was rolled back behind a committed checkpoint; the contents are deleted",
}
"""Allowed transitions, with their causes."""


def enforcing_triggers() -> str:
    """Return SQL triggers that refuse every change of state that is not in `TRANSITIONS`.

    The triggers, like the ledger's statements, use FAIL and not ABORT. The whole transaction is rolled back anyway, and
    ABORT would make SQLite copy pages so that it can undo a single statement.
    """
    allowed = ", ".join(f"'{origin}>{target}'" for origin, target in TRANSITIONS)
    return f"""
CREATE TRIGGER only_known_transitions BEFORE UPDATE OF state ON occurrences
WHEN old.state || '>' || new.state NOT IN ({allowed})
BEGIN SELECT RAISE(FAIL, 'no such transition of an occurrence'); END;
CREATE TRIGGER only_known_beginning BEFORE INSERT ON occurrences WHEN new.state != '{FIRST_STATE}'
BEGIN SELECT RAISE(FAIL, 'an occurrence begins as {FIRST_STATE}'); END;
"""


_STATE_COUNTS = "CREATE TABLE state_counts (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;"
"""Number of occurrences by state; of dropped ones by reason, as `dropped:REASON`."""
_INCARNATIONS = (
    "CREATE TABLE incarnations (number INTEGER PRIMARY KEY, process TEXT NOT NULL UNIQUE, actor_id TEXT NOT NULL)"
    " STRICT;"
)
"""The processes of each actor's name, in the order in which they were first heard."""
FROM_SCHEMA_5 = f"""
{_STATE_COUNTS}
{_INCARNATIONS}
INSERT INTO state_counts SELECT iif(state = 'dropped', 'dropped:' || reason, state) AS name, COUNT(*)
FROM occurrences GROUP BY name;
"""

TABLES = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
{_STATE_COUNTS}
{_INCARNATIONS}
CREATE TABLE occurrences (
    occurrence INTEGER PRIMARY KEY,
    prompt_id INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN {STATES}),
    reason TEXT NOT NULL DEFAULT '',
    holder TEXT NOT NULL,
    actor_id TEXT NOT NULL,
    request_number INTEGER NOT NULL,
    oldest_version INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL DEFAULT 0,
    num_tokens_squared INTEGER NOT NULL DEFAULT 0,
    useful_version INTEGER,
    reward_spread REAL,
    num_stale INTEGER NOT NULL DEFAULT 0,
    num_samples INTEGER,
    num_correct INTEGER
) STRICT;
CREATE INDEX pending ON occurrences (occurrence) WHERE state = 'pending';
CREATE INDEX leased ON occurrences (holder, request_number) WHERE state = 'leased';
CREATE INDEX ready ON occurrences (oldest_version, occurrence) WHERE state = 'ready';
CREATE INDEX used ON occurrences (occurrence) WHERE state = 'used';
CREATE TABLE uses (
    used_version INTEGER NOT NULL,
    batch_order INTEGER NOT NULL,
    occurrence INTEGER NOT NULL REFERENCES occurrences,
    PRIMARY KEY (used_version, batch_order),
    UNIQUE (occurrence, used_version)
) STRICT, WITHOUT ROWID;
CREATE TABLE payloads (
    occurrence INTEGER PRIMARY KEY REFERENCES occurrences,
    header BLOB NOT NULL,
    arrays BLOB NOT NULL
) STRICT;
CREATE TABLE stages (
    stage INTEGER PRIMARY KEY,
    first_occurrence INTEGER NOT NULL,
    policy_version INTEGER NOT NULL,
    began_at REAL NOT NULL,
    success_before REAL NOT NULL,
    groups_before INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    epoch_first_occurrence INTEGER NOT NULL,
    num_passed_over INTEGER NOT NULL,
    passed_over BLOB NOT NULL
) STRICT;
CREATE TABLE evaluations (
    requested_version INTEGER PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('pending', 'running', 'reported')),
    holder TEXT NOT NULL DEFAULT '',
    request_number INTEGER NOT NULL DEFAULT -1,
    report BLOB
) STRICT;
{enforcing_triggers()}"""
