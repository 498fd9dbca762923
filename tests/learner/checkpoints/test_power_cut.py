"""Power cuts of the whole machine, at any write: the real ledger, service and checkpoints on a disk that forgets."""

import random
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import learner.checkpoints.checkpoint
from buffer.config import BufferConfig
from buffer.ledger import ledger_file
from buffer.ledger.audit import audit
from buffer.ledger.ledger import Ledger
from buffer.service.turn import Turns
from buffer.transport import messages
from buffer.transport.connection import RequestRefused
from buffer.transport.packed_group import pack_group
from buffer.transport.router import Incoming
from learner.checkpoints.checkpoint import read_state, save_checkpoint, sound_checkpoint
from tests.buffer.forgetful_disk import ForgetfulDisk
from tests.learner.samples import CPU, make_group

pytestmark = pytest.mark.usefixtures("one_rank", "small_files")

ACTOR, LEARNER = "actor-0", "learner-0"
TOTAL, EVERY, GROUPS_PER_BATCH = 24, 3, 2
Lineage = dict[int, list[str]]


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pages, a log that is merged into the file every few batches, and checkpoints of one small file."""
    monkeypatch.setattr(ledger_file, "PAGE_BYTES", 1 << 12)
    monkeypatch.setattr(ledger_file, "WAL_BYTES", 30 << 12)
    for name in ("export_policy", "save_generators"):
        monkeypatch.setattr(learner.checkpoints.checkpoint, name, lambda *_, **__: None)


@pytest.fixture
def config(tmp_path: Path) -> BufferConfig:
    return BufferConfig(str(tmp_path), "ipc://nowhere", 10, "abc", GROUPS_PER_BATCH, 1)


class Engine:
    """Stands for a policy without weights."""

    device = CPU

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "state.pt").write_bytes(b"weights")


class PowerCutError(Exception):
    """The machine is off."""


class Life:
    """The buffer, an actor and a learner on one machine, from its start to the power cut after `num_calls` calls."""

    def __init__(self, config: BufferConfig, disk: ForgetfulDisk, num_calls: int, *, asks_first: bool) -> None:
        self.disk, self.num_calls, self.asks_first = disk, num_calls, asks_first
        self.checkpoints = Path(config.run_dir) / "checkpoints"
        self.number, self.suffix = 0, Path(config.run_dir).name
        """Every process has another name on its connection."""
        self.epoch = 0
        self.ledger = Ledger(config, 0.0)
        self.turns = Turns(config, self.ledger)
        self.answers: dict[int, messages.Message] = {}
        newest = sound_checkpoint(self.checkpoints)
        saved = {} if newest is None else read_state(newest)["lineage"]
        self.lineage: Lineage = {int(version): groups for version, groups in saved.items()}

    @property
    def version(self) -> int:
        return len(self.lineage)

    def train(self) -> None:
        """Train to the last version."""
        welcome = self.ask(LEARNER, messages.LearnerHello(self.version))
        assert isinstance(welcome, messages.LearnerWelcome)
        self.epoch = welcome.epoch
        while self.version < TOTAL:
            self.sample()
            shard = self.ask(LEARNER, messages.BatchRequest(self.version, 0, 1))
            if isinstance(shard, messages.Shard):
                self.lineage[self.version] = [group.header.group_id for group in shard.groups]
                if self.version % EVERY == 0:
                    self.save()

    def sample(self) -> None:
        """Deliver what was leased; the requests that wait are answered later, under their own numbers."""
        self.ask(ACTOR, messages.LeaseRequest("actor-0", self.version, 2, "abc"))
        replies = [answer for answer in self.answers.values() if isinstance(answer, messages.LeaseReply)]
        self.answers.clear()
        for lease in [lease for reply in replies for lease in reply.leases]:
            group = pack_group(make_group(lease.group_id, lease.prompt_id, version=self.version))
            self.ask(ACTOR, messages.GroupDelivery("actor-0", group))

    def save(self) -> None:
        begun = messages.CheckpointBegun(self.version)
        save_checkpoint(
            self.checkpoints,
            self.version,
            Engine(),  # type: ignore[arg-type]
            None,
            base_path=Path(),
            dtype=torch.float32,
            state={"lineage": self.lineage},
            keep=2,
            may_be_named=lambda: not self.asks_first or self.ask(LEARNER, begun) == messages.Done(),
        )
        self.ask(LEARNER, messages.CheckpointCommitted(self.version))

    def ask(self, sender: str, message: messages.Message) -> messages.Message | None:
        """The answer; None if the request waits."""
        identity = f"{sender}-{self.suffix}".encode()
        self.number += 1
        assert self.number < 1_000, "the run makes no progress"
        incoming = Incoming(identity, messages.with_epoch(message, self.epoch), self.number)
        for answer in self.turns.carry_out([incoming], False, 0.0):
            self.answers[answer.request_number] = answer.message
        if len(self.disk.events) >= self.num_calls:
            raise PowerCutError
        reply = self.answers.get(self.number)
        if isinstance(reply, messages.Refused):
            raise RequestRefused(reply.reason)
        return reply


def occurrences(lineage: Lineage) -> list[int]:
    return [int(group_id.partition(".")[0]) for groups in lineage.values() for group_id in groups]


def trained_twice(lineage: Lineage) -> bool:
    found = occurrences(lineage)
    return len(found) > len(set(found))


def run_through(config: BufferConfig, folder: Path, seed: int, *, asks_first: bool) -> tuple[Life, int]:
    """Train to the end through up to twelve power cuts. Returns the last life, and how many there were before."""
    chance, lives = random.Random(seed), 0
    disk = ForgetfulDisk(folder / "0")
    disk.folder.mkdir()
    while True:
        num_calls = int(10 ** chance.uniform(1.5, 3.1)) if lives < 12 else 10**9
        with disk.recording():
            life = Life(replace(config, run_dir=str(disk.folder)), disk, num_calls, asks_first=asks_first)
            try:
                life.train()
                return life, lives
            except PowerCutError:
                pass
            finally:
                life.ledger.close()
        lives += 1
        into = folder / str(lives)
        into.mkdir()
        disk.cut(num_calls, chance, into)


def test_after_any_power_cut_nothing_is_lost_and_nothing_trained_twice(config: BufferConfig, tmp_path: Path):
    """Under the default durability."""
    num_cuts = 0
    for seed in range(8):
        folder = tmp_path / str(seed)
        folder.mkdir()
        life, cuts = run_through(config, folder, seed, asks_first=True)
        num_cuts += cuts
        assert audit(life.disk.folder).problems == ()
        trained = sorted(occurrences(life.lineage))
        assert not trained_twice(life.lineage), (seed, trained)
        assert len(trained) == TOTAL * GROUPS_PER_BATCH
        with closing(sqlite3.connect(life.disk.folder / ledger_file.FILE_NAME)) as ledger:
            # Groups of the last checkpoint are still `used` if a cut came between its name and its commit.
            sql = "SELECT occurrence FROM occurrences WHERE state IN ('used', 'done') ORDER BY 1"
            assert [row[0] for row in ledger.execute(sql)] == trained, seed
    assert num_cuts > 20


def test_without_the_question_before_the_name_a_checkpoint_is_ahead_of_the_ledger(config: BufferConfig, tmp_path: Path):
    """The learner cannot go on then: the ledger would hand out groups again that are in the checkpoint."""
    with pytest.raises(RequestRefused, match="the ledger has handed out batches only up to policy"):
        for seed in range(40):
            folder = tmp_path / str(seed)
            folder.mkdir()
            run_through(config, folder, seed, asks_first=False)


def test_a_learner_that_outlives_the_buffers_machine_is_refused_until_it_starts_again(
    config: BufferConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whatever the ledger has forgotten, it does not go on with a learner whose batches it may not know."""
    num_behind = 0
    for seed in range(10):
        chance, folder = random.Random(seed), tmp_path / str(seed)
        disk = ForgetfulDisk(folder / "before")
        disk.folder.mkdir(parents=True)
        with disk.recording():
            monkeypatch.setattr("buffer.ledger.ledger.host_id", lambda: "one boot")
            life = Life(replace(config, run_dir=str(disk.folder)), disk, chance.randint(100, 500), asks_first=True)
            with pytest.raises(PowerCutError):
                life.train()
            num_calls = len(disk.events)
            life.ledger.close()
        (folder / "after").mkdir()
        disk.cut(num_calls, chance, folder / "after")
        monkeypatch.setattr("buffer.ledger.ledger.host_id", lambda: "the next boot")
        again = Life(replace(config, run_dir=str(disk.folder)), disk, 10**9, asks_first=True)
        next_version = again.turns.service._progress.next_version
        num_behind += next_version < life.version
        for message in (
            messages.BatchRequest(life.version, 0, 1, epoch=life.epoch),
            messages.CheckpointBegun(min(life.version, next_version), epoch=life.epoch),
        ):
            with pytest.raises(RequestRefused, match="only the newest one goes on"):
                again.ask(LEARNER, message)
        assert isinstance(again.ask(LEARNER, messages.LearnerHello(again.version)), messages.LearnerWelcome)
        again.ledger.close()
    assert num_behind, "no cut cost the ledger a batch that the learner had"
