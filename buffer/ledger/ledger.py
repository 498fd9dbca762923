"""The prompt ledger: the state of every prompt occurrence and the contents of every ready or used group, in one file.

An occurrence is one draw of a prompt; occurrences are numbered 0, 1, 2, ... Each is in exactly one state. States and
contents change only inside `transaction`, together; `buffer/ledger/states.py` lists the transitions:

    pending -> leased -> ready -> used -> done        dropped(reason) from leased and ready

    issued = pending + leased + ready + used + done + sum(dropped by reason)

A group id is `occurrence.attempt`. Each lease of an occurrence is a new attempt, so a late delivery of an earlier
attempt is recognized and counted. The contents of done and dropped groups are deleted; their rows stay.
`buffer/ledger/curriculum.py` draws the prompt of a new occurrence; `buffer/ledger/batches.py` records batches.

Called by `buffer/service/` only. `now` is seconds of a monotonic clock. Deadlines of leases are kept in memory; when
the ledger is reopened, every holder of a lease gets a new, full deadline.
"""

from __future__ import annotations

import heapq
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from buffer.config import BufferConfig
from buffer.ledger.batches import POISON, Batches, Poison
from buffer.ledger.curriculum import Curriculum
from buffer.ledger.evaluations import Evaluations
from buffer.ledger.ledger_file import LedgerFile
from buffer.ledger.sampler import Candidate
from buffer.ledger.stale_tokens import newest_sampled_version
from buffer.ledger.states import FIRST_STATE
from buffer.ledger.zero_advantage import REASON as NO_SIGNAL
from buffer.ledger.zero_advantage import ZeroAdvantageGroups
from buffer.transport.connection import host_id
from buffer.transport.packed_group import PackedGroup, read_group_header

STALE, INVALID = "stale", "invalid"
MAX_INVALID_ATTEMPTS = 3
CONTENTS_BYTES = 1 << 25
"""Contents of groups kept in memory, so that a batch need not read them from the file."""
LOST_VERSIONS = 1_000
"""Most versions that a ledger may lose when its machine is started again: those since the last checkpoint."""
_THESE = "occurrence IN (SELECT value FROM json_each(?))"
_Key = TypeVar("_Key", int, str)
_GROUP_ID = re.compile(r"(0|[1-9][0-9]{0,17})\.(0|[1-9][0-9]{0,17})")


@dataclass(frozen=True, slots=True)
class Holder:
    """The owner of a lease: one request on one connection of an actor process."""

    name: str
    """Name of the connection. Unique per process, so that a restarted actor is told apart from its predecessor."""
    actor_id: str
    request_number: int


class Ledger:
    """The single writer of one run's ledger.

    Raises:
        ValueError: when the file is in use, or was made with other prompts or settings of their order.
    """

    def __init__(self, config: BufferConfig, now: float) -> None:
        self._config = config
        self.file = LedgerFile(Path(config.run_dir), config.durability)
        self.evaluations, self.poison = Evaluations(self.file), Poison(self.file)
        self.counts: Counter[str] = Counter()
        """Number of occurrences by state; dropped ones by reason, as `dropped:reason`."""
        self.leased: Counter[int] = Counter()
        """Number of leased groups by the version of the actor's weights at the lease."""
        self.ready: Counter[int] = Counter()
        """Number of ready groups by oldest version."""
        self.held: Counter[str] = Counter()
        """Number of leased groups by holder."""
        self._deadlines: dict[str, float] = {}
        self._alarms: list[tuple[float, str]] = []
        """A heap with at most one entry per holder: when to look at its deadline next, which is never too late."""
        self._watched: set[str] = set()
        """The holders in the heap."""
        self._released: dict[str, float] = {}
        """Deadlines of the holders whose leases ended in the current transaction."""
        self._contents = RecentContents()
        try:
            self.curriculum = Curriculum(config, self.file)
            self.batches, self.zero_advantage = Batches(config, self.file), ZeroAdvantageGroups(config, self.file)
            with self.file.transaction():
                self._check_identity()
                self._note_boot()
                self.curriculum.open()
            self._load()
            self.curriculum.committed()
        except BaseException:
            self.close()
            raise
        for name in self._holder_names():
            self.start_deadline(name, now)

    def _check_identity(self) -> None:
        config = self._config
        wanted: dict[str, int | str] = {
            "data_fingerprint": config.data_fingerprint,
            "num_prompts": config.num_prompts,
            "shuffle": int(config.shuffle),
            "seed": config.seed,
            "curriculum": self.curriculum.fingerprint,
        }
        for key, value in wanted.items():
            stored = self.file.meta(key, None)
            if stored is None:
                self.file.set_meta(key, value)
            elif stored != value:
                raise ValueError(
                    f"the ledger in {config.run_dir} was made with {key} {stored!r}, the configuration says"
                    f" {value!r}; restore that setting or start a new run_dir"
                )

    def _note_boot(self) -> None:
        """End the learner's epoch if the machine was started again, because the ledger may have lost its last moments.

        A learner on another machine may have lived on, with batches that the ledger no longer knows. It is refused then
        and starts again from a checkpoint, all of whose batches the ledger knows. Actors go on with the weights of the
        versions that are lost, so these versions stay possible.
        """
        boot, before = host_id(), self.file.meta("boot", None)
        if boot != before:
            self.file.set_meta("boot", boot)
        if before not in (None, boot):
            self.file.set_meta("epoch", self.file.meta("epoch", 0) + 1)
            newest = self.file.meta("newest_version", self.file.meta("next_version", 0))
            self.file.set_meta("newest_version", newest + LOST_VERSIONS)

    def _load(self) -> None:
        """Read the state from the file. Reads only what is live: no row of a done or dropped group."""
        self.counts = Counter(dict(self.file.rows("SELECT name, value FROM state_counts")))
        self._saved_counts = self.counts.copy()
        self._load_live()

    def _load_live(self) -> None:
        by_version = "SELECT oldest_version, COUNT(*) FROM occurrences WHERE state = '{}' GROUP BY oldest_version"
        self.leased = Counter(dict(self.file.rows(by_version.format("leased"))))
        self.ready = Counter(dict(self.file.rows(by_version.format("ready"))))
        self._load_holders()
        self.curriculum.load()
        self.batches.load()
        self.zero_advantage.load()

    def _load_holders(self) -> None:
        by_holder = "SELECT holder, COUNT(*) FROM occurrences WHERE state = 'leased' GROUP BY holder"
        self.held = Counter(dict(self.file.rows(by_holder)))
        self.evaluations.load()

    def _save_counts(self) -> None:
        for name, number in self.counts.items():
            if number != self._saved_counts[name]:
                self.file.write("INSERT OR REPLACE INTO state_counts VALUES (?, ?)", name, number)
        self._saved_counts = self.counts.copy()

    def _holder_names(self) -> set[str]:
        return set(self.held) | self.evaluations.holders()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all changes inside the block together when it ends; undo all of them when it raises."""
        before = self.counts.copy(), self.leased.copy(), self.ready.copy()
        self._released.clear()
        try:
            with self.file.transaction():
                yield
                self._save_counts()
        except BaseException:
            self.counts, self.leased, self.ready = before
            self._saved_counts = self.counts.copy()
            self._load_holders()
            self.curriculum.undone()
            self.batches.load()
            self.zero_advantage.load()
            # Extended deadlines stay extended. A holder whose release was undone gets its old deadline back.
            for name, deadline in self._released.items():
                self._set_deadline(name, self._deadlines.get(name, deadline))
            raise
        self.curriculum.committed()

    def close(self) -> None:
        """Close the file; everything committed stays."""
        self.file.close()

    # Leases.

    def issue(self, holder: Holder, policy_version: int, now: float) -> tuple[str, int]:
        """Lease the next occurrence: the oldest pending one, else a new one. Returns group_id and prompt_id."""
        pending = self.counts["pending"] and self.file.rows(
            "SELECT occurrence, prompt_id, attempt FROM occurrences WHERE state = 'pending' ORDER BY occurrence LIMIT 1"
        )
        lease = (holder.name, holder.actor_id, holder.request_number, policy_version)
        if pending:
            occurrence, prompt_id, attempt = pending[0]
            attempt += 1
            self.file.write(
                "UPDATE OR FAIL occurrences SET state = 'leased', attempt = ?, holder = ?, actor_id = ?,"
                " request_number = ?, oldest_version = ?, num_tokens = 0, num_tokens_squared = 0 WHERE occurrence = ?",
                *(attempt, *lease, occurrence),
            )
            self._move("pending", "leased")
            self.file.count("reissued")
        else:
            occurrence, attempt = self.file.meta("issued", 0), 0
            prompt_id = self.curriculum.draw(occurrence)
            self.file.set_meta("issued", occurrence + 1)
            self.file.write(
                "INSERT OR FAIL INTO occurrences"
                " (occurrence, prompt_id, attempt, state, holder, actor_id, request_number, oldest_version)"
                f" VALUES (?, ?, ?, '{FIRST_STATE}', ?, ?, ?, ?)",
                *(occurrence, prompt_id, attempt, *lease),
            )
            self.counts["leased"] += 1
        self.leased[policy_version] += 1
        self.held[holder.name] += 1
        self.start_deadline(holder.name, now)
        return f"{occurrence}.{attempt}", prompt_id

    def leases_of(self, holder_name: str, request_number: int) -> list[tuple[str, int]]:
        """Return the leases granted to this request that have not ended, as (group_id, prompt_id)."""
        rows = self.file.rows(
            "SELECT occurrence || '.' || attempt, prompt_id FROM occurrences"
            " WHERE state = 'leased' AND holder = ? AND request_number = ? ORDER BY occurrence",
            holder_name,
            request_number,
        )
        return [(group_id, prompt_id) for group_id, prompt_id in rows]

    def deliver(self, group: PackedGroup, next_version: int) -> str:
        """Store or drop a delivered group. The next batch is for `next_version`.

        Returns:
            The outcome: stored; dropped: the group is too stale or has zero advantage; duplicate: this attempt was
            delivered before; late: the lease has ended; unknown: no such lease was ever granted.
        """
        header = group.header
        row = self._find(header.group_id)
        if row is None or row.prompt_id != header.prompt_id:
            outcome = "unknown"
        elif row.is_older_attempt or row.state == "pending" or (row.state == "dropped" and not row.is_judged):
            outcome = "late"
        else:
            outcome = "stored" if row.state == "leased" else "duplicate"
        if row is None or outcome != "stored":
            self.file.count(outcome)
            return outcome
        if header.oldest_version < row.oldest_version:
            self.file.count("older_than_leased")
        masks = self._config.on_stale == "mask"
        useful_version = newest_sampled_version(group) if masks else header.oldest_version
        if self._config.on_stale != "wait" and useful_version + self._config.max_staleness < next_version:
            self._end_lease(row.occurrence, row.oldest_version, row.holder, self._count_stale(row.occurrence))
            return "dropped"
        reason = NO_SIGNAL if self.zero_advantage.drops(header) else ""
        state = "dropped" if reason else "ready"
        success = header.num_correct / len(header.details)
        spread = _spread(header.rewards) if self._config.sampler == "prioritized" else None
        self.file.write(
            "UPDATE OR FAIL occurrences SET state = ?, reason = ?, oldest_version = ?, useful_version = ?,"
            " num_tokens = ?, num_tokens_squared = ?, num_samples = ?, num_correct = ?, reward_spread = ?"
            " WHERE occurrence = ?",
            *(state, reason, header.oldest_version, useful_version, sum(header.num_tokens)),
            *(sum(number**2 for number in header.num_tokens), len(header.details), header.num_correct, spread),
            row.occurrence,
        )
        self._move("leased", _count_key(state, reason))
        self.curriculum.delivered(row.occurrence, row.prompt_id, success)
        _decrement(self.leased, row.oldest_version)
        _decrement(self.held, row.holder)
        if reason:
            return "dropped"
        self.file.write_contents(row.occurrence, group.header_frame, group.arrays_frame)
        self.ready[header.oldest_version] += 1
        self._contents.add(row.occurrence, group)
        return outcome

    def refuse_delivery(self, group_id: str) -> str:
        """End the lease of a group that was delivered and is out of bounds. Returns the outcome: invalid.

        The prompt is sampled again, or dropped if this was at least its `MAX_INVALID_ATTEMPTS`th attempt, so that no
        prompt whose groups are always out of bounds keeps the run from going on.
        """
        row = self._find(group_id)
        if row is not None and not row.is_older_attempt and row.state == "leased":
            is_last = int(group_id.partition(".")[2]) + 1 >= MAX_INVALID_ATTEMPTS
            self._end_lease(row.occurrence, row.oldest_version, row.holder, INVALID if is_last else "")
        self.file.count(INVALID)
        return INVALID

    def give_back(self, group_id: str, holder_name: str, reason: str) -> bool:
        """End a lease of a holder. Returns False when the holder does not have the lease, or no longer.

        The occurrence becomes pending again, or is dropped if a `reason` is given.
        """
        row = self._find(group_id)
        if row is None or row.is_older_attempt or row.state != "leased" or row.holder != holder_name:
            return False
        self._end_lease(row.occurrence, row.oldest_version, row.holder, reason)
        return True

    def release(self, holder_name: str) -> int:
        """End all leases and evaluations of a holder; they become pending again. Returns their number."""
        rows = self.file.rows(
            "SELECT occurrence, oldest_version FROM occurrences WHERE state = 'leased' AND holder = ?", holder_name
        )
        for occurrence, version in rows:
            self._end_lease(occurrence, version, holder_name, "")
        deadline = self._deadlines.pop(holder_name, None)
        if deadline is not None:
            self._released.setdefault(holder_name, deadline)
        if rows:
            self.file.count("expired", len(rows))
        return len(rows) + self.evaluations.release(holder_name)

    def release_unheld(self, holder: Holder, held: Collection[str], evaluating: Collection[int] | None = None) -> int:
        """End what the holder was granted before this request and does not say it has. Returns the number of leases.

        Their prompts, and the evaluations, become pending again. `evaluating` None: the holder did not say.
        """
        ended = 0
        if self.held[holder.name]:
            known = set(held)
            rows = self.file.rows(
                "SELECT occurrence, attempt, oldest_version FROM occurrences"
                " WHERE state = 'leased' AND holder = ? AND request_number < ?",
                holder.name,
                holder.request_number,
            )
            for occurrence, attempt, version in rows:
                if f"{occurrence}.{attempt}" not in known:
                    self._end_lease(occurrence, version, holder.name, "")
                    ended += 1
        if ended:
            self.file.count("unheld", ended)
        if evaluating is not None:
            self.evaluations.release(holder.name, holder.request_number, evaluating)
        return ended

    def not_leased(self, holder_name: str, group_ids: Sequence[str]) -> tuple[str, ...]:
        """Return those of the groups that are not leased to the holder."""
        leased = self.held[holder_name] and self.file.rows(
            "SELECT occurrence || '.' || attempt FROM occurrences WHERE state = 'leased' AND holder = ?", holder_name
        )
        known = {row[0] for row in leased or ()}
        return tuple(group_id for group_id in group_ids if group_id not in known)

    def newest_request(self, holder_name: str) -> int:
        """Return the number of the newest request of the holder that has a lease or an evaluation; -1: none."""
        sql = "SELECT MAX(request_number) FROM occurrences WHERE state = 'leased' AND holder = ?"
        newest = self.file.one(sql, holder_name) if self.held[holder_name] else None
        return max(-1 if newest is None else newest, self.evaluations.newest_request(holder_name))

    def extend_deadline(self, holder_name: str, now: float) -> None:
        """Extend the holder's deadline, because the holder is alive."""
        if holder_name in self._deadlines:
            self._deadlines[holder_name] = now + self._config.lease_seconds

    def start_deadline(self, holder_name: str, now: float) -> None:
        """Start the holder's deadline, because the holder was granted a lease or an evaluation."""
        self._set_deadline(holder_name, now + self._config.lease_seconds)

    def _set_deadline(self, holder_name: str, deadline: float) -> None:
        self._deadlines[holder_name] = deadline
        self._watch(holder_name)

    def _watch(self, holder_name: str) -> None:
        if holder_name not in self._watched:
            self._watched.add(holder_name)
            heapq.heappush(self._alarms, (self._deadlines[holder_name], holder_name))

    def silent_holders(self, now: float) -> list[str]:
        """Return the holders whose deadline has passed."""
        due = []
        while self._alarms and self._alarms[0][0] <= now:
            name = heapq.heappop(self._alarms)[1]
            self._watched.remove(name)
            if name in self._deadlines:
                due.append(name)
        # Silent ones are watched, too: they are found again until they are released.
        for name in due:
            self._watch(name)
        return [name for name in due if self._deadlines[name] <= now]

    def other_holders(self, holder_name: str, actor_id: str) -> list[str]:
        """Return the other holders that have leases of the same actor."""
        rows = self.file.rows(
            "SELECT DISTINCT holder FROM occurrences WHERE state = 'leased' AND actor_id = ? AND holder != ?",
            actor_id,
            holder_name,
        )
        return [row[0] for row in rows]

    def leased_by_actor(self, most: int) -> tuple[dict[str, int], int]:
        """Return the number of leases of the `most` actors with the most, and that of all others together."""
        sql = "SELECT actor_id, COUNT(*) AS number FROM occurrences WHERE state = 'leased' GROUP BY actor_id"
        rows: dict[str, int] = dict(self.file.rows(f"{sql} ORDER BY number DESC, actor_id LIMIT ?", most))
        return rows, self.counts["leased"] - sum(rows.values())

    # Batches.

    def candidates(self, policy_version: int) -> list[Candidate]:
        """Return candidates for the batch for `policy_version`; empty when too few.

        For fifo, only the first ready groups.
        """
        size = self._config.groups_per_batch
        if self.ready.total() + self.batches.num_reusable(policy_version) < size:
            return []
        rows = self.file.rows(
            "SELECT occurrence, oldest_version, 0, COALESCE(reward_spread, 0) FROM occurrences WHERE state = 'ready'"
            " ORDER BY oldest_version, occurrence LIMIT ?",
            size if self._config.sampler == "fifo" else -1,
        )
        return [Candidate(*row) for row in rows] + self.batches.candidates(policy_version)

    def use(self, occurrences: Sequence[int], policy_version: int) -> None:
        """Hand groups out as the batch for `policy_version`, in the given order."""
        listed = json.dumps(occurrences)
        sql = f"SELECT occurrence, oldest_version, state FROM occurrences WHERE {_THESE}"
        for occurrence, version, state in self.file.rows(sql, listed):
            if state == "ready":
                self._move("ready", "used")
                _decrement(self.ready, version)
            elif state != "used":
                raise RuntimeError(f"occurrence {occurrence} is {state}, neither ready nor used")
        self.file.write(f"UPDATE OR FAIL occurrences SET state = 'used' WHERE state = 'ready' AND {_THESE}", listed)
        self.batches.add(policy_version, listed)
        self.batches.load()

    def payload(self, occurrence: int) -> PackedGroup:
        """Return the contents of a ready or used group."""
        group = self._contents.take(occurrence)
        if group is None:
            frames = self.file.rows("SELECT header, arrays FROM payloads WHERE occurrence = ?", occurrence)[0]
            group = read_group_header(*frames)
        return group

    def commit(self, policy_version: int, next_version: int) -> int:
        """Record that the checkpoint of `policy_version` is durable. Returns the number of groups that are now done.

        Groups are done when only batches before `policy_version` used them and no batch from `next_version` on can use
        them. Their contents are deleted.
        """
        last = self._config.num_batches * self._config.updates_per_batch
        done, expired = self.batches.finished(policy_version, next_version, is_over=0 < last <= next_version)
        self.file.write(f"DELETE FROM payloads WHERE {_THESE}", json.dumps(done))
        self.file.write(f"UPDATE OR FAIL occurrences SET state = 'done' WHERE {_THESE}", json.dumps(done))
        if expired:
            self.file.count("uses_expired", expired)
        self._move("used", "done", len(done))
        self.batches.load()
        return len(done)

    def drop_stale(self, next_version: int) -> int:
        """Resample or drop the ready groups that no batch from `next_version` on can use. Returns their number."""
        rows = self.file.rows(
            "SELECT occurrence, prompt_id, oldest_version FROM occurrences"
            " WHERE state = 'ready' AND useful_version < ?",
            next_version - self._config.max_staleness,
        )
        for occurrence, _, version in rows:
            reason = self._count_stale(occurrence)
            self.file.write("DELETE FROM payloads WHERE occurrence = ?", occurrence)
            state = "dropped" if reason else "pending"
            self.file.write(
                "UPDATE OR FAIL occurrences SET state = ?, reason = ?, num_samples = NULL, num_correct = NULL"
                " WHERE occurrence = ?",
                *(state, reason, occurrence),
            )
            self._move("ready", _count_key(state, reason))
            _decrement(self.ready, version)
            self._contents.take(occurrence)
        self.curriculum.read_again({prompt_id for _, prompt_id, _ in rows})
        return len(rows)

    def roll_back(self, policy_version: int) -> int:
        """Undo all batches from `policy_version` on, because the learner restarts there. Returns the undone uses.

        Used groups without an earlier use become ready again. Done groups, which exist if the learner restarts before a
        committed checkpoint, have no contents any more; their prompts become pending, so that none is skipped.
        """
        undone = "occurrence IN (SELECT occurrence FROM uses WHERE used_version >= ?)"
        only_use = undone + " AND NOT EXISTS (SELECT 1 FROM uses WHERE uses.occurrence = occurrences.occurrence"
        only_use += " AND used_version < ?)"
        number = self.file.one(
            "SELECT COUNT(*) FROM uses CROSS JOIN occurrences USING (occurrence)"
            " WHERE used_version >= ? AND state = 'used'",
            policy_version,
        )
        ready_again = self.file.write(
            f"UPDATE OR FAIL occurrences SET state = 'ready' WHERE state = 'used' AND {only_use}",
            *(policy_version, policy_version),
        )
        resampled = self.file.write(
            "UPDATE OR FAIL occurrences SET state = 'pending', num_samples = NULL, num_correct = NULL"
            f" WHERE state = 'done' AND {only_use}",
            *(policy_version, policy_version),
        )
        self.file.write("DELETE FROM uses WHERE used_version >= ?", policy_version)
        self.evaluations.roll_back(policy_version)
        self.zero_advantage.reset()
        self.file.count("rolled_back", number)
        self.file.count("resampled", resampled)
        self._move("used", "ready", ready_again)
        self._move("done", "pending", resampled)
        self._load_live()
        return int(number)

    def set_aside(self, occurrences: Sequence[int]) -> int:
        """Drop those of the groups that are ready, because the learner fails on them. Returns their number."""
        sql = f"SELECT occurrence, oldest_version FROM occurrences WHERE state = 'ready' AND {_THESE}"
        rows = self.file.rows(sql, json.dumps(occurrences))
        ready = [occurrence for occurrence, _ in rows]
        listed = json.dumps(ready)
        self.file.write(f"DELETE FROM payloads WHERE {_THESE}", listed)
        self.file.write(f"UPDATE OR FAIL occurrences SET state = 'dropped', reason = '{POISON}' WHERE {_THESE}", listed)
        self._move("ready", _count_key("dropped", POISON), len(ready))
        for _, version in rows:
            _decrement(self.ready, version)
        for occurrence in ready:
            self._contents.take(occurrence)
        return len(ready)

    def _find(self, group_id: str) -> _Row | None:
        match = _GROUP_ID.fullmatch(group_id)
        if match is None:
            return None
        rows = self.file.rows(
            "SELECT occurrence, prompt_id, attempt, state, oldest_version, num_samples IS NOT NULL, holder"
            " FROM occurrences WHERE occurrence = ?",
            int(match[1]),
        )
        if not rows or int(match[2]) > rows[0][2]:
            return None
        occurrence, prompt_id, attempt, state, oldest_version, is_judged, holder = rows[0]
        return _Row(occurrence, prompt_id, int(match[2]) < attempt, state, oldest_version, bool(is_judged), holder)

    def _end_lease(self, occurrence: int, version: int, holder_name: str, reason: str) -> None:
        state = "dropped" if reason else "pending"
        self.file.write(
            "UPDATE OR FAIL occurrences SET state = ?, reason = ? WHERE occurrence = ?", state, reason, occurrence
        )
        self._move("leased", _count_key(state, reason))
        _decrement(self.leased, version)
        _decrement(self.held, holder_name)

    def _count_stale(self, occurrence: int) -> str:
        """Count a group of the occurrence as too stale.

        Returns the reason to drop the occurrence, or "" to sample its prompt again.
        """
        num_stale = self.file.one("SELECT num_stale FROM occurrences WHERE occurrence = ?", occurrence) + 1
        self.file.write("UPDATE OR FAIL occurrences SET num_stale = ? WHERE occurrence = ?", num_stale, occurrence)
        self.file.count(STALE)
        return STALE if num_stale > self._config.max_reissues else ""

    def _move(self, origin: str, target: str, number: int = 1) -> None:
        self.counts[origin] -= number
        self.counts[target] += number


class RecentContents:
    """Contents that this process received and that no batch has had yet: at most `CONTENTS_BYTES`, the oldest ones."""

    def __init__(self) -> None:
        self._groups: dict[int, PackedGroup] = {}
        self._num_bytes = 0

    def add(self, occurrence: int, group: PackedGroup) -> None:
        """Keep a group's contents if there is room: groups that came earlier are in a batch earlier."""
        self.take(occurrence)
        if self._num_bytes + group.num_bytes <= CONTENTS_BYTES:
            self._groups[occurrence] = group
            self._num_bytes += group.num_bytes

    def take(self, occurrence: int) -> PackedGroup | None:
        """Return the group's contents if they are kept, and forget them."""
        group = self._groups.pop(occurrence, None)
        self._num_bytes -= group.num_bytes if group is not None else 0
        return group


@dataclass(frozen=True, slots=True)
class _Row:
    occurrence: int
    prompt_id: int
    is_older_attempt: bool
    state: str
    oldest_version: int
    is_judged: bool
    """Whether the current attempt was delivered, even if the group was then dropped for its rewards."""
    holder: str


def _count_key(state: str, reason: str) -> str:
    return f"dropped:{reason}" if state == "dropped" else state


def _spread(rewards: Sequence[float]) -> float:
    """Return the mean |reward - mean reward|: the mean |advantage| with the group's mean reward as the baseline."""
    mean = sum(rewards) / len(rewards)
    return sum(abs(reward - mean) for reward in rewards) / len(rewards)


def _decrement(counts: Counter[_Key], key: _Key) -> None:
    """Subtract one group. Keys without groups are removed, so that a counter never outgrows what is outstanding."""
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
