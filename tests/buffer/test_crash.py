"""The buffer is killed at random instructions; nothing is lost, skipped or trained on too often."""

import random
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from buffer.curriculum_config import Stage, write_levels
from buffer.ledger.audit import audit
from buffer.ledger.ledger_file import FILE_NAME
from buffer.transport import messages
from tests.buffer.killed_buffer import KilledBuffer
from tests.buffer.reference_curriculum import ReferenceCurriculum

ACTOR = b"actor-0-aa"
BATCHES = 150
GROUPS_PER_BATCH = 2
NUM_PROMPTS, LEVELS = 7, [1, 2, 3, 1, 2, 3, 1]
STAGES = [
    Stage(max_level=1, until_success=0.5, over_groups=20, samples_per_group=2),
    Stage(max_level=2, at_most_steps=40, samples_per_group=3),
    Stage(min_level=2, until_step=100),
    Stage(),
]


def rows(run_dir: Path, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{run_dir / FILE_NAME}?mode=ro", uri=True)) as database:
        return database.execute(sql).fetchall()


class Run:
    """One actor, and one learner that sometimes goes back to its last checkpoint, with a buffer that is killed."""

    def __init__(self, buffer: KilledBuffer, seed: int, make_group: Any) -> None:
        self.buffer, self.random, self.make_group = buffer, random.Random(seed), make_group
        self.number, self.lives, self.version, self.committed, self.epoch = 0, 0, 0, 0, 0
        self.stored: set[str] = set()
        self.held: set[str] = set()
        """Groups whose receipt arrived."""
        self.lineage: dict[int, tuple[str, ...]] = {}
        """Groups of each version's batch, as the learner received them."""

    def ask(self, identity: bytes, message: messages.Message) -> None:
        self.number += 1
        self.buffer.ask(identity, messages.with_epoch(message, self.epoch), self.number)

    @property
    def learner(self) -> bytes:
        return f"learner-{self.lives}".encode()

    def begin_learning(self) -> None:
        self.lives += 1
        self.version = self.committed
        self.lineage = {version: groups for version, groups in self.lineage.items() if version < self.version}
        self.ask(self.learner, messages.LearnerHello(self.version))

    def go_on(self) -> None:
        """Run until the last batch is committed."""
        self.begin_learning()
        self.ask(ACTOR, messages.LeaseRequest("actor-0", 0, 3, "abc", tuple(self.held)))
        for answer in self.buffer.answers():
            if answer is None:
                self.check_the_file()
                continue
            identity, request, reply = answer
            if identity == ACTOR:
                self.act(request, reply)
            elif identity == self.learner:
                self.learn(request, reply)
            if self.committed == BATCHES:
                return

    def act(self, request: messages.Message, reply: messages.Message) -> None:
        match reply:
            case messages.LeaseReply():
                for lease in reply.leases:
                    self.held.add(lease.group_id)
                    size = lease.samples_per_group or 2
                    group = self.make_group(lease.group_id, lease.prompt_id, self.version, size=size)
                    self.ask(ACTOR, messages.GroupDelivery("actor-0", group))
                self.ask(ACTOR, messages.LeaseRequest("actor-0", self.version, 3, "abc", tuple(self.held)))
            case messages.GroupReceipt():
                assert reply.outcome in ("stored", "duplicate"), reply
                self.stored.add(reply.group_id)
                self.held.discard(reply.group_id)
            case _:
                assert isinstance(request, messages.Heartbeat)

    def learn(self, request: messages.Message, reply: messages.Message) -> None:
        match request, reply:
            case messages.LearnerHello(), messages.LearnerWelcome():
                self.epoch = reply.epoch
            case messages.BatchRequest(), messages.Shard():
                self.lineage[self.version] = tuple(group.header.group_id for group in reply.groups)
                self.version += 1
                self.ask(ACTOR, messages.Heartbeat("actor", "actor-0", self.version, "", {}))
                if self.random.random() < 0.15:
                    return self.begin_learning()
                if self.version % 3 == 0:
                    return self.ask(self.learner, messages.CheckpointCommitted(self.version))
            case messages.CheckpointCommitted(), messages.Done():
                self.committed = request.policy_version
        if self.version < BATCHES:
            self.ask(self.learner, messages.BatchRequest(self.version, 0, 1))

    def check_the_file(self) -> None:
        """After a kill: the ledger's invariants hold, and every group with a receipt is in it."""
        if not self.stored:
            return
        run_dir = Path(self.buffer.config.run_dir)
        assert audit(run_dir).problems == ()
        kept = {
            f"{occurrence}.{attempt}"
            for occurrence, attempt in rows(
                run_dir, "SELECT occurrence, attempt FROM occurrences WHERE state IN ('ready', 'used', 'done')"
            )
        }
        assert self.stored <= kept


@pytest.mark.parametrize(
    ("seed", "durability", "stages", "replay"),
    [
        (0, "full", STAGES, {}),
        (1, "normal", [], {"max_uses": 2, "sampler": "uniform"}),
        (2, "normal", STAGES, {}),
        (3, "memory", [], {}),
    ],
)
def test_a_buffer_that_dies_at_any_instruction_loses_nothing(
    make_config: Any,
    make_group: Any,
    run_dir: Path,
    seed: int,
    durability: str,
    stages: list[Stage],
    replay: dict[str, Any],
):
    write_levels(run_dir, LEVELS)
    how = {"durability": durability, "stages": stages, "num_prompts": NUM_PROMPTS, "max_staleness": 2} | replay
    config = make_config(groups_per_batch=GROUPS_PER_BATCH, **how)
    buffer = KilledBuffer(config, random.Random(seed), max_deaths=60)
    run = Run(buffer, seed, make_group)
    with buffer.alive():
        run.go_on()
    assert buffer.deaths >= 20
    found = audit(run_dir)
    assert found.problems == ()
    assert found.uses == BATCHES * GROUPS_PER_BATCH
    in_file: dict[int, list[str]] = {}
    for version, occurrence, attempt in rows(
        run_dir,
        "SELECT used_version, occurrence, attempt FROM uses JOIN occurrences USING (occurrence)"
        " ORDER BY used_version, batch_order",
    ):
        in_file.setdefault(version, []).append(f"{occurrence}.{attempt}")
    assert {version: tuple(groups) for version, groups in in_file.items()} == run.lineage, "what the learner trained on"
    trained = Counter(group for groups in run.lineage.values() for group in groups)
    assert max(trained.values()) == config.max_uses
    assert all(len(set(groups)) == GROUPS_PER_BATCH for groups in run.lineage.values())
    assert found.counts["done"] + found.counts["used"] == len(trained)
    assert config.max_uses > 1 or not found.counts["used"]
    assert len(found.stages) == max(1, len(stages))
    assert all(row.policy_version == reached for row, reached in zip(found.stages, (0, 10, 50, 100), strict=False))
    reference, begun = ReferenceCurriculum(config, LEVELS), 1
    for k in range(found.issued):
        while begun < len(found.stages) and found.stages[begun].first_occurrence == k:
            reference.begin_stage(0)
            begun += 1
        reference.draw()
    drawn = rows(run_dir, "SELECT occurrence, prompt_id FROM occurrences ORDER BY occurrence")
    assert drawn == list(enumerate(reference.prompts)), "no prompt is skipped or repeated within an epoch of a stage"
    assert found.issued - len(trained) <= 3 * GROUPS_PER_BATCH, "what is not trained on is outstanding"
