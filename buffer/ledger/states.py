"""The state machine of an occurrence: its states and every change there is, in one table.

`buffer/ledger/ledger_file.py` turns the table into triggers, so that the database itself refuses any other change.
"""

from __future__ import annotations

STATES = ("pending", "leased", "ready", "used", "done", "dropped")
FIRST_STATE = "leased"
"""A new occurrence is made for the actor that leases it."""

TRANSITIONS = {
    ("pending", "leased"): "an actor asks, and admission has room",
    ("leased", "ready"): "its group is delivered",
    ("leased", "pending"): "its actor is silent, new or gives the lease back, or its group comes too stale",
    ("leased", "dropped"): "its actor gives the lease back with a reason, or its group has no signal or is too stale",
    ("ready", "pending"): "it has become too stale, and is sampled again",
    ("ready", "dropped"): "it has become too stale once too often",
    ("ready", "used"): "it is in a batch for the first time",
    ("used", "done"): "a checkpoint that contains its effect is committed, and it can be in no later batch",
    ("used", "ready"): "the learner is back at an older version",
    ("done", "pending"): "the learner is back behind a committed checkpoint; the contents are gone",
}


def enforcing_triggers() -> str:
    """SQL that refuses every change of state that is not in the table.

    FAIL and not ABORT, here as in the ledger's own statements: the whole transaction is undone anyway, and to be able
    to undo one statement SQLite would copy a page for each.
    """
    allowed = ", ".join(f"'{origin}>{target}'" for origin, target in TRANSITIONS)
    return f"""
CREATE TRIGGER only_known_transitions BEFORE UPDATE OF state ON occurrences
WHEN old.state || '>' || new.state NOT IN ({allowed})
BEGIN SELECT RAISE(FAIL, 'no such transition of an occurrence'); END;
CREATE TRIGGER only_known_beginning BEFORE INSERT ON occurrences WHEN new.state != '{FIRST_STATE}'
BEGIN SELECT RAISE(FAIL, 'an occurrence begins as {FIRST_STATE}'); END;
"""
