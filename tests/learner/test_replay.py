"""Groups that are used twice, and zero-advantage groups, with the real buffer and the real learner."""

import re
import shutil
import sqlite3
from contextlib import closing

import pytest

import tests.learner.scripted_run
from buffer.ledger.ledger_file import FILE_NAME
from learner.algorithms.grpo import GRPO
from learner.checkpoints.manifest import newest_checkpoint
from learner.monitoring.stop_conditions import NoSignalError
from tests.learner.scripted_run import GROUPS_PER_BATCH
from tests.learner.test_survival import equal_rewards
from tests.learner.test_train import Runs, start_run

__all__ = ["start_run"]
pytestmark = pytest.mark.usefixtures("one_rank")


def test_a_learner_that_comes_back_uses_groups_again_as_the_ledger_says(
    start_run: Runs, caplog: pytest.LogCaptureFixture
):
    run = start_run(max_uses=2, num_batches=6)
    run.start_actor()
    caplog.set_level("INFO")

    def stop_after_four(version: int) -> None:
        if version == 4:
            run.stopping.set()

    trainer, _ = run.learn(GRPO(), 6, checkpoint_every=3, on_publish=stop_after_four)
    assert trainer.version == 4
    going_back = newest_checkpoint(run.directory / "checkpoints")
    assert going_back is not None
    shutil.rmtree(going_back)
    run.stopping.clear()
    run.learn(GRPO(), 6, checkpoint_every=3)
    ledger = run.audit()
    assert ledger.problems == ()
    assert (ledger.uses, ledger.counts["used"]) == (6 * GROUPS_PER_BATCH, 0)
    assert ledger.counts["done"] < 6 * GROUPS_PER_BATCH and ledger.staleness_max <= 2
    with closing(sqlite3.connect(run.directory / FILE_NAME)) as database:
        uses = set(database.execute("SELECT used_version, occurrence FROM uses"))
    lines = [re.match(r"policy (\d+) trains on groups (\S+)$", message) for message in caplog.messages]
    # The last line about a version counts.
    last = {int(line[1]): occurrences(line[2]) for line in lines if line}
    assert {(version, k) for version, groups in last.items() for k in groups} == uses


def occurrences(ranges: str) -> list[int]:
    pairs = [part.partition("-") for part in ranges.split(",")]
    return [k for first, _, last in pairs for k in range(int(first), int(last or first) + 1)]


def test_groups_without_signal_end_the_run_with_a_checkpoint(start_run: Runs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tests.learner.scripted_run, "make_group", equal_rewards)
    run = start_run(drop_no_signal=True, max_no_signal=6)
    run.start_actor()
    with pytest.raises(NoSignalError, match=r"policy 0: 6 groups in a row were dropped as no_signal"):
        run.learn(GRPO(), 9)
    assert newest_checkpoint(run.directory / "checkpoints") == run.directory / "checkpoints" / "00000000"
    assert run.audit().dropped["no_signal"] >= 6
