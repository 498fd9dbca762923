import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from buffer.__main__ import main
from buffer.config import BufferConfig
from buffer.curriculum_config import Skip, Stage, write_levels
from buffer.ledger.audit import audit
from buffer.ledger.ledger import Ledger
from buffer.service.service import Service
from buffer.transport import messages
from buffer.transport.messages import StageStatus

LEVELS = [3, 4, 3, 4, 3, 4]
STAGES = [
    Stage(max_level=3, until_success=0.5, over_groups=4, samples_per_group=2, max_new_tokens=8),
    Stage(min_level=4, until_step=5, samples_per_group=4),
    Stage(),
]
BY_LEVEL = {3: {0, 2, 4}, 4: {1, 3, 5}}


class Run:
    """An actor with the newest weights and a learner, with the real service."""

    def __init__(self, config: BufferConfig, make_group: Any) -> None:
        self.config, self.make_group, self.number = config, make_group, 0
        self.held: list[str] = []
        self.version = 0
        self.open()
        self.tell(b"learner", messages.LearnerHello(0))

    def open(self) -> None:
        self.ledger = Ledger(self.config, 0.0)
        self.service = Service(self.config, self.ledger)

    def restart(self) -> None:
        self.ledger.close()
        self.open()

    def tell(self, identity: bytes, message: messages.Message) -> Any:
        self.number += 1
        message = messages.with_epoch(message, self.ledger.file.meta("epoch", 0))
        with self.ledger.transaction():
            answers = self.service.receive(identity, message, self.number, 0.0) + self.service.wake(0.0)
        return next((answer.message for answer in answers if answer.identity == identity), None)

    def lease(self, number: int = 2) -> list[messages.Lease]:
        held = tuple(self.held)
        reply = self.tell(b"actor-0", messages.LeaseRequest("actor-0", self.version, number, "abc", held))
        self.held += [lease.group_id for lease in reply.leases]
        return list(reply.leases)

    def deliver(self, leases: list[messages.Lease], success: float = 0.5) -> None:
        for lease in leases:
            packed = self.make_group(lease.group_id, lease.prompt_id, self.version, verdicts=VERDICTS[success])
            assert self.tell(b"actor-0", messages.GroupDelivery("actor-0", packed)).outcome == "stored"

    def train(self) -> None:
        assert isinstance(self.tell(b"learner", messages.BatchRequest(self.version, 0, 1)), messages.Shard)
        self.version += 1

    def step(self, success: float = 0.5) -> list[messages.Lease]:
        """Lease, deliver and train one batch."""
        leases = self.lease()
        self.deliver(leases, success)
        self.train()
        return leases

    def epoch(self, num_prompts: int, success: dict[int, float]) -> set[int]:
        """Draw `num_prompts` prompts, two at a time; deliver with `success` by prompt, else 0.5. Returns them."""
        drawn = []
        while len(drawn) < num_prompts:
            for lease in self.lease():
                drawn.append(lease.prompt_id)
                self.deliver([lease], success.get(lease.prompt_id, 0.5))
            self.train()
        assert len(drawn) == num_prompts
        return set(drawn)

    @property
    def status(self) -> StageStatus:
        return self.ledger.curriculum.status()


VERDICTS = {1.0: ("correct", "correct"), 0.5: ("correct", "wrong"), 0.0: ("timeout", "wrong")}


@pytest.fixture
def start(make_config: Any, make_group: Any, run_dir: Path):
    """A function that starts a run; runs are closed at the end."""
    runs = []

    def starting(**changes: Any) -> Run:
        write_levels(run_dir, LEVELS)
        config = make_config(**({"num_prompts": len(LEVELS), "stages": STAGES, "max_staleness": 0} | changes))
        runs.append(Run(config, make_group))
        return runs[-1]

    yield starting
    for run in runs:
        run.ledger.close()
    assert audit(run_dir).problems == ()


def test_stages_go_by_as_they_should(start: Any, run_dir: Path, caplog: pytest.LogCaptureFixture):
    run, drawn = start(), []
    caplog.set_level(logging.INFO, "buffer.ledger.curriculum")
    for success in (0.0, 0.0, 0.5, 1.0, 0.5, 0.5, 0.5):
        drawn.append(run.step(success))
    prompts = [{lease.prompt_id for lease in leases} for leases in drawn]
    assert set().union(*prompts[:4]) == BY_LEVEL[3], "0, 0, 0.5 and 1 over two groups each: half only after the fourth"
    assert prompts[4] <= BY_LEVEL[4], "from policy 4 to 5"
    assert set().union(*prompts[5:]) & BY_LEVEL[3], "everything"
    sizes = [{(lease.samples_per_group, lease.max_new_tokens) for lease in leases} for leases in drawn]
    assert sizes == [{(2, 8)}] * 4 + [{(4, 0)}] + [{(0, 0)}] * 2
    assert caplog.messages == [
        "stage 2 of 3 begins at policy 4: success 0.75 over 4 groups",
        "stage 3 of 3 begins at policy 5: success 0.50 over 2 groups",
    ]
    rows = [(row.stage, row.first_occurrence, row.policy_version, row.success_before) for row in audit(run_dir).stages]
    assert rows == [(1, 0, 0, 0.0), (2, 8, 4, 0.75), (3, 10, 5, 0.5)]


def test_inspect_and_status_say_where_it_is(start: Any, run_dir: Path, capsys: pytest.CaptureFixture[str]):
    run = start()
    for _ in range(3):
        run.step()
    assert run.tell(b"anyone", messages.StatusRequest()).stage == StageStatus(2, 3, 0.5, 2, 0)
    assert main(["inspect", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert "stage 1 began at policy 0 with occurrence 0; epoch 1, 0 prompts passed over\n" in printed
    assert "stage 2 began at policy 2 with occurrence 4, after success 0.50 over 4 groups; epoch 0, 0 " in printed


def test_an_occurrence_keeps_its_stage(start: Any):
    """Groups of the first stage are leased again, or delivered, during the second."""
    run = start(max_staleness=3)
    slow = run.lease(2)
    for success in (0.5, 0.5):
        run.deliver(run.lease(2), success)
        run.train()
    assert run.status.stage == 2
    run.tell(b"actor-0", messages.LeaseReturn("actor-0", (slow[0].group_id,), ""))
    (again,) = run.lease(1)
    assert (again.prompt_id, again.group_id) == (slow[0].prompt_id, "0.1")
    assert (again.samples_per_group, again.max_new_tokens) == (2, 8)
    run.deliver([again, slow[1]], 1.0)
    run.train()
    assert run.status == StageStatus(2, 3, 0.0, 0, 0), "it does not count for the second"
    assert run.lease(1)[0].samples_per_group == 4


@pytest.mark.parametrize("steps", range(1, 8))
def test_a_restart_changes_nothing(start: Any, steps: int, tmp_path: Path, make_config: Any, make_group: Any):
    """Compare with a run in another directory that is never restarted."""
    run = start()
    write_levels(tmp_path, LEVELS)
    other = Run(make_config(**vars(run.config) | {"run_dir": str(tmp_path)}), make_group)
    for step in range(9):
        leases, same = run.lease(), other.lease()
        assert leases == same
        if step == steps:
            run.restart()
        for one in (run, other):
            one.deliver(leases, 0.5)
            one.train()
        assert run.status == other.status
    assert run.status.stage == 3
    other.ledger.close()


def test_a_switch_that_is_not_committed_did_not_happen(start: Any):
    run = start()
    run.step()
    leases = run.lease()
    run.deliver(leases)
    with pytest.raises(KeyError), run.ledger.transaction():
        run.service.receive(b"learner", messages.BatchRequest(1, 0, 1, epoch=1), 99, 0.0)
        run.service.wake(0.0)
        assert run.status.stage == 2
        raise KeyError
    assert run.status == StageStatus(1, 3, 0.5, 2, 0)
    run.service = Service(run.config, run.ledger)
    run.train()
    assert run.status.stage == 2


def test_a_rollback_brings_no_stage_back_and_trains_its_groups_again(start: Any, run_dir: Path):
    run = start()
    first = [lease.group_id for _ in range(3) for lease in run.step()]
    assert run.status == StageStatus(2, 3, 0.5, 2, 0)
    run.tell(b"learner-2", messages.LearnerHello(1))
    assert run.status == StageStatus(2, 3, 0.0, 0, 0), "its groups are ready again"
    run.version = 1
    shards = []
    for version in (1, 2):
        shards.append(run.tell(b"learner-2", messages.BatchRequest(version, 0, 1)))
    assert [group.header.group_id for shard in shards for group in shard.groups] == first[2:]
    assert run.status == StageStatus(2, 3, 0.5, 2, 0)
    assert [row.policy_version for row in audit(run_dir).stages] == [0, 2]


def test_resampled_groups_forget_their_success(start: Any, run_dir: Path):
    """After a rollback behind a committed checkpoint the earlier policy's successes do not count."""
    run = start(stages=[])
    run.step(1.0)
    run.tell(b"learner", messages.CheckpointCommitted(1))
    run.tell(b"learner-2", messages.LearnerHello(0))
    with closing(sqlite3.connect(run_dir / "ledger.sqlite")) as database:
        found = database.execute("SELECT state, num_correct FROM occurrences").fetchall()
    assert found == [("pending", None)] * 2
    assert run.status.num_groups == 0


@pytest.mark.parametrize("change", [{"stages": STAGES[1:]}, {"stages": []}, {"levels": [3, 3, 3, 4, 4, 4]}])
def test_another_curriculum_is_refused(make_config: Any, run_dir: Path, change: dict[str, Any]):
    settings = {"num_prompts": len(LEVELS), "stages": STAGES}
    write_levels(run_dir, LEVELS)
    Ledger(make_config(**settings), 0.0).close()
    write_levels(run_dir, change.pop("levels", LEVELS))
    with pytest.raises(ValueError, match=r"made with curriculum .* restore that setting"):
        Ledger(make_config(**settings | change), 0.0)


def test_a_curriculum_by_levels_needs_levels(make_config: Any):
    with pytest.raises(ValueError, match=r"levels.json cannot be read"):
        Ledger(make_config(stages=STAGES), 0.0)


def test_a_stage_without_prompts_is_refused(make_config: Any, run_dir: Path):
    write_levels(run_dir, LEVELS)
    with pytest.raises(ValueError, match="stage 2 has no prompts"):
        Ledger(make_config(num_prompts=6, stages=[Stage(until_step=1), Stage(min_level=5)]), 0.0)


# The difficulty filter.


def test_solved_and_unsolved_prompts_are_passed_over_from_the_next_epoch_on(start: Any):
    solved, unsolved = Skip(1.0, seen=2), Skip(0.0, seen=1)
    run = start(stages=[], skip_solved=solved, skip_unsolved=unsolved, revisit_epochs=4)
    everything = set(range(6))
    assert run.epoch(6, {0: 1.0, 1: 1.0, 2: 0.0, 3: 0.0}) == everything
    assert run.epoch(4, {0: 1.0, 1: 1.0}) == everything - {2, 3}, "failed once"
    assert run.status.num_passed_over == 2
    run.restart()
    assert run.epoch(2, {}) == {4, 5}, "solved twice"
    assert run.status.num_passed_over == 4
    assert run.epoch(2, {}) == {4, 5}
    assert run.epoch(6, {0: 0.5, 1: 1.0, 2: 0.5, 3: 0.0}) == everything, "the fourth epoch draws all prompts again"
    assert run.status.num_passed_over == 0
    assert run.epoch(4, {}) == {0, 2, 4, 5}, "one was not solved any more, one not failed"


def test_a_filter_that_would_pass_everything_over_rests(start: Any, caplog: pytest.LogCaptureFixture):
    run = start(stages=[], skip_solved=Skip(0.5, seen=1))
    for _ in range(2):
        assert run.epoch(6, {}) == set(range(6))
    assert (
        "stage 1, epoch 1: the filter would pass all 6 prompts over, so this epoch ignores the filter"
        in caplog.messages
    )


def test_a_stage_begins_with_all_its_prompts(start: Any):
    """A prompt that is too hard with short completions may be easy with longer ones."""
    stages = [Stage(until_step=6, max_new_tokens=8), Stage(max_new_tokens=16)]
    run = start(stages=stages, skip_unsolved=Skip(0.0, seen=1))
    assert run.epoch(6, {0: 0.0}) == set(range(6))
    assert 0 not in {lease.prompt_id for _ in range(3) for lease in run.step()}
    assert run.epoch(6, {}) == set(range(6))
