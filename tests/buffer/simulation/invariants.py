"""What must hold after every turn of the buffer, at every batch, and at the end of a run."""

from __future__ import annotations

import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

from buffer.config import BufferConfig
from buffer.ledger.audit import _audit
from buffer.transport import messages
from buffer.transport.schema import Frame
from tests.buffer.simulation.learner_process import Lineage
from tests.buffer.simulation.virtual_time import InvariantError, World

_ROWS = "SELECT occurrence, attempt, state, reason, holder, num_stale FROM occurrences"
KEPT = ("ready", "used", "done")


class Checker:
    """Compares what the buffer says with what its ledger holds, and with what learner and actors saw."""

    def __init__(self, world: World, config: BufferConfig) -> None:
        self._world, self._config = world, config
        self.acknowledged: set[str] = set()
        """Groups whose delivery was answered with `stored` and that are not done yet."""
        self.may_forget = False
        """Whether a power cut may have taken groups and leases that somebody still knows of."""
        self.has_rolled_back = False
        self.delivered: dict[str, set[bytes]] = {}
        """The arrays of every delivered group."""
        self.outcomes: Counter[str] = Counter()
        self.states: dict[int, tuple[Any, ...]] = {}
        self._data_version = -1

    def fail(self, what: str) -> None:
        raise InvariantError(what)

    def reopened(self, reader: sqlite3.Connection, *, forgot: bool) -> None:
        """The buffer has a new process; it may have forgotten what was not durable."""
        self._data_version = -1
        if forgot:
            # The learner goes back, too, to a version that the ledger knows.
            self.may_forget = self.has_rolled_back = True
            self._read(reader)
            self.acknowledged = {group_id for group_id in self.acknowledged if self._state(group_id) in KEPT}

    def after_turn(self, reader: sqlite3.Connection, sent: list[tuple[bytes, Any, int]]) -> None:
        """Check the ledger and the answers that this turn sent."""
        data_version = reader.execute("PRAGMA data_version").fetchone()[0]
        if data_version != self._data_version:
            self._data_version = data_version
            self._read(reader)
            found = _audit(reader, Path("ledger"))
            if found.problems:
                self.fail(f"the ledger's audit: {found.problems}")
            if found.counters.get("resampled", 0):
                self.fail("a group of a committed checkpoint is sampled again")
            self._check_acknowledged()
        for identity, answer, _ in sent:
            match answer:
                case messages.GroupReceipt():
                    self._check_receipt(answer)
                # After a power cut a group may be leased again under the same id, in the turn that says it has ended.
                case messages.HeartbeatReply() if not self.may_forget:
                    for group_id in answer.ended:
                        row = self.states.get(int(group_id.partition(".")[0]))
                        if self._state(group_id) == "leased" and row is not None and row[4] == identity.decode():
                            self.fail(f"{row[4]} was told that its lease of {group_id} has ended, but it has not")

    def _read(self, reader: sqlite3.Connection) -> None:
        self.states = {row[0]: row for row in reader.execute(_ROWS)}

    def _state(self, group_id: str) -> str:
        """Return the state of this attempt; empty when it is over or unknown."""
        occurrence, attempt = map(int, group_id.split("."))
        row = self.states.get(occurrence)
        return row[2] if row is not None and row[1] == attempt else ""

    def _check_acknowledged(self) -> None:
        for group_id in sorted(self.acknowledged):
            state = self._state(group_id)
            if state in KEPT:
                continue
            row = self.states.get(int(group_id.partition(".")[0]))
            if self._config.on_stale == "wait" or row is None or not row[5]:
                self.fail(f"group {group_id} was stored, now its occurrence is {row}")
            self.acknowledged.discard(group_id)

    def _check_receipt(self, receipt: messages.GroupReceipt) -> None:
        group_id, state = receipt.group_id, self._state(receipt.group_id)
        row = self.states.get(int(group_id.partition(".")[0]))
        self.outcomes[receipt.outcome] += 1
        match receipt.outcome:
            case "stored":
                # It may be in a batch already, and even be stale, in the turn that received it.
                truthful = state in KEPT or (self._config.on_stale != "wait" and row is not None and row[5] > 0)
                self.acknowledged.add(group_id)
            case "dropped":
                truthful = row is not None and (row[2] == "dropped" or row[5] > 0)
            case "duplicate":
                truthful = state in (*KEPT, "dropped")
            case "late":
                truthful = state not in KEPT
            case _:
                truthful = self.may_forget
        if not truthful:
            self.fail(f"the receipt {receipt.outcome} for {group_id} is not true: {row}")

    # The learner.

    def delivery(self, group_id: str, arrays: Frame) -> None:
        self.delivered.setdefault(group_id, set()).add(bytes(arrays))

    def trained(self, version: int, shards: list[messages.Shard], lineage: Lineage) -> None:
        """Check a batch that the learner trains on."""
        groups = lineage[version]
        if len(groups) != self._config.groups_per_batch or len(set(groups)) != len(groups):
            self.fail(f"the batch for {version} is {groups}")
        if len({len(shard.groups) for shard in shards}) != 1:
            self.fail(f"the ranks' shares of the batch for {version} differ")
        times = Counter(group_id for batch in lineage.values() for group_id in batch)
        often = {group_id: number for group_id, number in times.items() if number > self._config.max_uses}
        if often:
            self.fail(f"groups trained on more than {self._config.max_uses} times by version {version}: {often}")
        strict = self._config.on_stale == "drop" or (self._config.on_stale == "wait" and not self.has_rolled_back)
        for shard in shards:
            for staleness, packed in zip(shard.staleness, shard.groups, strict=True):
                group_id = packed.header.group_id
                if strict and staleness > self._config.max_staleness:
                    self.fail(f"group {group_id} has staleness {staleness} in the batch for {version}")
                is_masked = staleness > self._config.max_staleness
                if not is_masked and bytes(packed.arrays_frame) not in self.delivered.get(group_id, ()):
                    self.fail(f"group {group_id} of the batch for {version} is not what was delivered")

    def account(self, reader: sqlite3.Connection, lineage: Lineage) -> None:
        """Compare the batches behind the final weights with the ledger's."""
        found: dict[int, list[str]] = {}
        sql = "SELECT used_version, occurrence, attempt FROM uses JOIN occurrences USING (occurrence)"
        for version, occurrence, attempt in reader.execute(sql):
            found.setdefault(version, []).append(f"{occurrence}.{attempt}")
        for version in sorted(found.keys() | lineage.keys()):
            ledgers, learners = sorted(found.get(version, [])), sorted(lineage.get(version, ()))
            if ledgers != learners:
                self.fail(f"the batch for {version}: the ledger has {ledgers}, the learner {learners}")
        left = {row[0]: row[2] for row in self.states.values() if row[2] == "used"}
        if left:
            self.fail(f"the run is over and committed, but these are still used: {left}")
