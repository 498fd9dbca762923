"""Which group was in which batch, and which groups may be in a batch again.

Owned by `buffer/ledger/ledger.py`, written inside its transactions. A use is one row; a batch that is asked for again
is served from its rows, and a rollback deletes exactly the rows from its version on. A group that was used keeps its
contents while it may be used again: fewer than max_uses times, and useful_version + max_staleness not below the batch's
version.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from buffer.config import BufferConfig
from buffer.ledger.ledger_file import LedgerFile
from buffer.ledger.sampler import Candidate


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One group of a batch that was handed out."""

    occurrence: int
    staleness: int
    num_tokens: int
    """Of all its trajectories."""
    num_tokens_squared: int
    """Each trajectory's number squared, added up."""

    def cost(self, attention_crossover_tokens: float) -> float:
        """What training on it costs, as `wire.BatchRequest` says, in tokens."""
        return self.num_tokens + (
            self.num_tokens_squared / attention_crossover_tokens if attention_crossover_tokens > 0 else 0.0
        )


class Batches:
    """The table `uses`. Call `load` before anything else, and when a transaction was undone."""

    def __init__(self, config: BufferConfig, file: LedgerFile) -> None:
        self._config, self._file = config, file
        self.reusable: Counter[tuple[int, int]] = Counter()
        """Used groups that may be used again, by (useful_version, uses so far); some may be too stale by now."""

    def load(self) -> None:
        """Rebuild what is kept in memory; to be called after every change of a state or a use."""
        if self._config.max_uses > 1:
            sql = (
                "SELECT useful_version, num_uses, COUNT(*) FROM"
                " (SELECT useful_version, COUNT(*) AS num_uses FROM occurrences CROSS JOIN uses USING (occurrence)"
                "  WHERE state = 'used' GROUP BY occurrence) WHERE num_uses < ? GROUP BY 1, 2"
            )
            rows = self._file.rows(sql, self._config.max_uses)
            self.reusable = Counter({(version, uses): number for version, uses, number in rows})

    def num_reusable(self, policy_version: int) -> int:
        """How many used groups may be in the batch for `policy_version`."""
        oldest = policy_version - self._config.max_staleness
        return sum(number for (version, _), number in self.reusable.items() if version >= oldest)

    def candidates(self, policy_version: int) -> list[Candidate]:
        """Used groups that may be in the batch for `policy_version`."""
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
        """The batch for `policy_version` is made of these, a JSON list in order; the file refuses one twice."""
        self._file.write("INSERT OR FAIL INTO uses SELECT ?, key, value FROM json_each(?)", policy_version, occurrences)

    def batch(self, policy_version: int) -> list[BatchRow]:
        """The groups handed out for `policy_version`, in order; empty when none were, or their contents are gone."""
        rows = self._file.rows(
            "SELECT occurrence, oldest_version, num_tokens, num_tokens_squared, state"
            " FROM uses CROSS JOIN occurrences USING (occurrence) WHERE used_version = ? ORDER BY batch_order",
            policy_version,
        )
        if any(state != "used" for *_, state in rows):
            return []
        return [BatchRow(occurrence, policy_version - oldest, *lengths) for occurrence, oldest, *lengths, _ in rows]

    def finished(self, policy_version: int, next_version: int, *, is_over: bool) -> tuple[list[int], int]:
        """Used groups whose uses are all before `policy_version`, and that can be in no batch from `next_version` on.

        Args:
            policy_version: of the checkpoint that contains them.
            next_version: of the next batch.
            is_over: whether the run has no more batches.

        Returns:
            Their occurrences, and how many of them may have been used more often, but are too stale.
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
