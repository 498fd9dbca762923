"""The curriculum: the current stage and epoch, and the prompt that is drawn next.

Owned by `buffer/ledger/ledger.py`, written inside its transactions. All state is in the ledger's file, so a restart at
any moment continues with the same prompt. The table `stages` has one row per stage begun; the last row also holds the
current epoch and the prompts left out of it. `occurrences` holds the number of correct completions of every group.

A stage draws its prompts in epochs. An epoch draws every prompt of the stage once, except those that the difficulty
filter passes over; the filter decides when the epoch begins. A stage ends in the transaction that hands out a batch.
Occurrences drawn before that keep their stage. A rollback of the learner undoes neither stages nor draws.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from bisect import bisect_right
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from buffer.config import BufferConfig
from buffer.curriculum_config import Stage, prompts_of, read_levels
from buffer.ledger.ledger_file import SUCCESS, LedgerFile
from buffer.ledger.prompt_order import RecentGroups, epoch_order
from buffer.transport.messages import StageStatus

log = logging.getLogger(__name__)


class Curriculum:
    """Draws the prompts of one run. Call `open` inside a transaction, then `load`, before any other method.

    Raises:
        ValueError: when stages select levels and the run's levels cannot be read, or a stage has no prompts.
    """

    def __init__(self, config: BufferConfig, file: LedgerFile) -> None:
        self._config, self._file = config, file
        self._stages = tuple(config.stages) or (Stage(),)
        self._levels = np.zeros(config.num_prompts, np.int64)
        if any(stage.has_levels for stage in self._stages):
            self._levels = read_levels(Path(config.run_dir), config.num_prompts)
        for number, stage in enumerate(self._stages, start=1):
            if not prompts_of(stage, self._levels).size:
                raise ValueError(f"curriculum stage {number} has no prompts in {config.run_dir}; change its levels")
        self._changed: set[int] = set()
        """Prompts whose latest groups changed in the open transaction."""
        self._all_changed = False
        """Whether `load` was called in it."""
        self._ordered: object = None
        """What `_order` was made from."""
        self._num_recent = max(config.skip_solved.seen, config.skip_unsolved.seen)
        """Number of each prompt's latest groups that the difficulty filter considers; 0: the filter is off."""
        described = json.dumps([asdict(stage) for stage in self._stages]).encode() + self._levels.tobytes()
        self.fingerprint = hashlib.sha256(described).hexdigest()[:16]
        """Hash of the stages' settings and of all prompts' levels."""

    def open(self) -> None:
        """Begin the first stage if the ledger is new. The difficulty filter needs an index to look a prompt up."""
        if self._num_recent:
            self._file.write(
                "CREATE INDEX IF NOT EXISTS delivered ON occurrences (prompt_id, occurrence)"
                " WHERE num_samples IS NOT NULL"
            )
        if not self._file.one("SELECT COUNT(*) FROM stages"):
            self._begin_stage(1, 0, 0.0, 0)

    def load(self) -> None:
        """Rebuild the state in memory from the file. With the difficulty filter, reads all groups of the stage."""
        self._load_epoch()
        delivered = "occurrence >= ? AND num_samples IS NOT NULL"
        sql = f"SELECT occurrence, prompt_id, {SUCCESS} FROM occurrences WHERE {delivered} ORDER BY occurrence"
        groups = self._file.rows(sql, self._firsts[-1]) if self._num_recent else []
        self._recent = RecentGroups(len(self._levels), self._num_recent, groups)
        self._all_changed = True

    def _load_epoch(self) -> None:
        self._firsts = [row[0] for row in self._file.rows("SELECT first_occurrence FROM stages ORDER BY stage")]
        self._number = len(self._firsts)
        self._stage = self._stages[self._number - 1]
        self._began_version, self._epoch, self._epoch_first, packed = self._file.rows(
            "SELECT policy_version, epoch, epoch_first_occurrence, passed_over FROM stages WHERE stage = ?",
            self._number,
        )[0]
        prompts = prompts_of(self._stage, self._levels)
        # One bit per prompt; a shorter column is filled with zeros. NumPy fills only if there is at least one byte.
        skipped = np.unpackbits(np.frombuffer(packed or b"\0", np.uint8), count=len(prompts)).astype(np.bool_)
        self._set_epoch(prompts, skipped)

    def committed(self) -> None:
        """Keep what changed since the last call, because the transaction is in the file."""
        self._changed.clear()
        self._all_changed = False

    def undone(self) -> None:
        """Restore the state before the transaction that was undone. Reads only what the transaction changed."""
        if self._all_changed:
            self.load()
        else:
            self._load_epoch()
            self.read_again(self._changed)
        self.committed()

    def read_again(self, prompt_ids: Collection[int]) -> None:
        """Tell the difficulty filter that groups of these prompts are delivered no longer."""
        if not self._num_recent:
            return
        for prompt_id in prompt_ids:
            rows = self._file.rows(
                f"SELECT occurrence, prompt_id, {SUCCESS} FROM occurrences WHERE prompt_id = ? AND occurrence >= ?"
                " AND num_samples IS NOT NULL ORDER BY occurrence DESC LIMIT ?",
                *(prompt_id, self._firsts[-1], self._num_recent),
            )
            self._recent.replace(prompt_id, rows[::-1])
        self._changed.update(prompt_ids)

    def draw(self, occurrence: int) -> int:
        """Draw the prompt of a new occurrence. Occurrences must be drawn one after another, without a gap."""
        if occurrence - self._epoch_first >= len(self._order):
            self._begin_epoch(occurrence)
        return int(self._order[occurrence - self._epoch_first])

    def stage_of(self, occurrence: int) -> Stage:
        """Return the stage that drew the occurrence."""
        return self._stages[bisect_right(self._firsts, occurrence) - 1]

    def delivered(self, occurrence: int, prompt_id: int, success: float) -> None:
        """Tell the difficulty filter about a delivered group and its share of correct completions."""
        if self._num_recent and occurrence >= self._firsts[-1]:
            self._recent.add(occurrence, prompt_id, success)
            self._changed.add(prompt_id)

    def advance(self, next_version: int) -> None:
        """Begin the next stage if the current one is over.

        Called after a batch is handed out; the next batch is for `next_version`.
        """
        while self._number < len(self._stages) and self._stage.ends(
            next_version, self._began_version, self._successes()
        ):
            before = self.status()
            self._begin_stage(self._number + 1, next_version, before.success, before.num_groups)
            log.info(
                "stage %d of %d begins at policy %d: success %.2f over %d groups",
                *(self._number, len(self._stages), next_version, before.success, before.num_groups),
            )

    def status(self) -> StageStatus:
        """Return the state for the terminal display and TensorBoard."""
        successes = self._successes()
        groups = len(successes)
        success = sum(successes) / groups if groups else 0.0
        return StageStatus(self._number, len(self._stages), success, groups, self._num_passed_over)

    def _successes(self) -> list[float]:
        """Return the shares of correct completions of the stage's latest groups, newest first.

        Groups count that the learner has used or that were dropped because their rewards were all equal. Without the
        latter a stage whose prompts are all solved would never end.
        """
        rows = self._file.rows(
            f"SELECT {SUCCESS} FROM occurrences WHERE occurrence >= ? AND (state IN ('used', 'done')"
            " OR state = 'dropped' AND num_samples IS NOT NULL) ORDER BY occurrence DESC LIMIT ?",
            *(self._firsts[-1], self._stage.over_groups),
        )
        return [row[0] for row in rows]

    def _begin_stage(self, number: int, policy_version: int, success_before: float, groups_before: int) -> None:
        occurrence = self._file.meta("issued", 0)
        self._file.write(
            "INSERT INTO stages (stage, first_occurrence, policy_version, began_at, success_before, groups_before,"
            " epoch, epoch_first_occurrence, num_passed_over, passed_over) VALUES (?, ?, ?, ?, ?, ?, 0, ?, 0, x'')",
            *(number, occurrence, policy_version, time.time(), success_before, groups_before, occurrence),
        )
        self.load()

    def _begin_epoch(self, occurrence: int) -> None:
        prompts = prompts_of(self._stage, self._levels)
        self._epoch, self._epoch_first = self._epoch + 1, occurrence
        skipped = self._filter(prompts)
        where = f"stage {self._number}, epoch {self._epoch}"
        if skipped.all():
            log.warning(
                "%s: the filter would pass all %d prompts over, so this epoch ignores the filter", where, len(prompts)
            )
            skipped = np.zeros(len(prompts), np.bool_)
        elif skipped.any():
            log.info("%s: %d of %d prompts are passed over", where, skipped.sum(), len(prompts))
        self._file.write(
            "UPDATE stages SET epoch = ?, epoch_first_occurrence = ?, num_passed_over = ?, passed_over = ?"
            " WHERE stage = ?",
            *(self._epoch, occurrence, int(skipped.sum()), np.packbits(skipped).tobytes(), self._number),
        )
        self._set_epoch(prompts, skipped)

    def _filter(self, prompts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return a mask of the stage's prompts that the new epoch passes over."""
        config = self._config
        if not self._num_recent or (config.revisit_epochs and self._epoch % config.revisit_epochs == 0):
            return np.zeros(len(prompts), np.bool_)
        return self._recent.teach_nothing(prompts, config.skip_solved, config.skip_unsolved)

    def _set_epoch(self, prompts: NDArray[np.int64], skipped: NDArray[np.bool_]) -> None:
        config = self._config
        self._num_passed_over = int(skipped.sum())
        made_from = self._number, self._epoch, skipped.tobytes()
        if made_from == self._ordered:
            return
        self._ordered = made_from
        self._order = epoch_order(
            prompts[~skipped], shuffle=config.shuffle, seed=config.seed, stage=self._number, epoch=self._epoch
        )
