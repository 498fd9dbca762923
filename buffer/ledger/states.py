"""The state machine of a prompt occurrence: its states and all allowed transitions.

`buffer/ledger/ledger_file.py` turns the transitions into triggers, so that SQLite itself refuses any other change.
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
    ("ready", "dropped"): "the group has become too stale, and buffer.max_reissues is exceeded",
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
