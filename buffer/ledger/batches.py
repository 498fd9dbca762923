"""Batches: which groups each batch consists of, and which used groups may be in a batch again.

Owned by `buffer/ledger/ledger.py`, written inside its transactions. A *use* is the place of one group in one batch, and
one row of the table `uses`. A batch that is requested again is served from its rows. A rollback deletes the rows of its
version and of later ones.

A used group may be in the batch for version v again if it has fewer than max_uses uses and
v <= useful_version + max_staleness. Its contents are kept as long as a later batch could use them.

A group is *poison* when the learner failed on it twice; it is then set aside, so that the run goes on. Only an error
that was raised while a batch was trained on counts, as the learner's next process reports it in its hello
(`learner/monitoring/failed_batch.py`). A learner that was killed, was stopped or lost a connection has no such report,
so none of these costs a group.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from buffer.config import BufferConfig
from buffer.ledger.ledger_file import LedgerFile
from buffer.ledger.sampler import Candidate

POISON = "poison"
"""Name of these groups in the ledger."""
FAILURES = 2
"""Failures on a group after which it is poison."""


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One group of a batch that was handed out."""

    occurrence: int
    staleness: int
    num_tokens: int
    """Sum over the group's trajectories."""
    num_tokens_squared: int
    """Sum of the trajectories' squared numbers of tokens."""

    def cost(self, attention_crossover_tokens: float) -> float:
        """Return the cost of training on the group, in tokens (`BatchRequest` in `buffer/transport/messages.py`)."""
        return self.num_tokens + (
            self.num_tokens_squared / attention_crossover_tokens if attention_crossover_tokens > 0 else 0.0
        )


class Batches:
    """The table `uses`. Call `load` first, and after a transaction was rolled back."""

    def __init__(self, config: BufferConfig, file: LedgerFile) -> None:
        self._config, self._file = config, file
        self.reusable: Counter[tuple[int, int]] = Counter()
        """Number of used groups with fewer than max_uses uses, by (useful_version, uses so far), also of stale ones."""

    def load(self) -> None:
        """Recompute `reusable` from the file. Must be called after every change of a state or a use."""
        if self._config.max_uses > 1:
            sql = (
                "SELECT useful_version, num_uses, COUNT(*) FROM"
                " (SELECT useful_version, COUNT(*) AS num_uses FROM occurrences CROSS JOIN uses USING (occurrence)"
                "  WHERE state = 'used' GROUP BY occurrence) WHERE num_uses < ? GROUP BY 1, 2"
            )
            rows = self._file.rows(sql, self._config.max_uses)
            self.reusable = Counter({(version, uses): number for version, uses, number in rows})

    def num_reusable(self, policy_version: int) -> int:
        """Return the number of used groups that may be in the batch for `policy_version`."""
        oldest = policy_version - self._config.max_staleness
        return sum(number for (version, _), number in self.reusable.items() if version >= oldest)

    def candidates(self, policy_version: int) -> list[Candidate]:
        """Return the used groups that may be in the batch for `policy_version`."""
        if not self.num_reusable(policy_version):
            return []
        rows = self._file.rows(
            "SELECT occurrence, oldest_version, COUNT(*) AS num_uses, COALESCE(reward_spread, 0)"
            " FROM occurrences CROSS JOIN uses USING (occurrence)"
            " WHERE state = 'used' AND useful_version >= ? GROUP BY occurrence HAVING num_uses < ?",
            policy_version - self._config.max_staleness,
            self._config.max_uses,
        )
        return [Candidate(*row) for row in rows]

    def add(self, policy_version: int, occurrences: str) -> None:
        """Store the batch for `policy_version`. `occurrences` is a JSON list, in order; SQLite refuses duplicates."""
        self._file.write("INSERT OR FAIL INTO uses SELECT ?, key, value FROM json_each(?)", policy_version, occurrences)

    def batch(self, policy_version: int) -> list[BatchRow]:
        """Return the groups of the batch for `policy_version`, in order.

        Empty if there is none or contents are deleted.
        """
        rows = self._file.rows(
            "SELECT occurrence, oldest_version, num_tokens, num_tokens_squared, state"
            " FROM uses CROSS JOIN occurrences USING (occurrence) WHERE used_version = ? ORDER BY batch_order",
            policy_version,
        )
        if any(state != "used" for *_, state in rows):
            return []
        return [BatchRow(occurrence, policy_version - oldest, *lengths) for occurrence, oldest, *lengths, _ in rows]

    def row(self, policy_version: int, occurrence: int) -> BatchRow | None:
        """Return one group of the batch for `policy_version`; None if it is not in the batch or has no contents."""
        rows = self._file.rows(
            "SELECT oldest_version, num_tokens, num_tokens_squared FROM uses CROSS JOIN occurrences USING (occurrence)"
            " WHERE used_version = ? AND occurrence = ? AND state = 'used'",
            policy_version,
            occurrence,
        )
        return BatchRow(occurrence, policy_version - rows[0][0], *rows[0][1:]) if rows else None

    def finished(self, policy_version: int, next_version: int, *, is_over: bool) -> tuple[list[int], int]:
        """Find used groups that only batches before `policy_version` used and no batch from `next_version` on can use.

        Args:
            policy_version: version of the checkpoint.
            next_version: version of the next batch.
            is_over: whether the run has no more batches.

        Returns:
            Their occurrences, and the number of those that have fewer than max_uses uses but are too stale.
        """
        rows = self._file.rows(
            "SELECT occurrence, useful_version, COUNT(*) FROM occurrences CROSS JOIN uses USING (occurrence)"
            " WHERE state = 'used' GROUP BY occurrence HAVING MAX(used_version) < ?",
            policy_version,
        )
        most, oldest = self._config.max_uses, next_version - self._config.max_staleness
        expired = [occurrence for occurrence, version, uses in rows if uses < most and version < oldest]
        done = [occurrence for occurrence, version, uses in rows if is_over or uses >= most or version < oldest]
        return done, len(expired)


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
