from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.offpolicy import main
from benchmarks.parts.offpolicy.cells import CORRECTIONS, STALENESS, Cell, Scale, add_line, grid, missing, read_lines
from benchmarks.parts.offpolicy.report import by_cell, draw, measure, updates_to
from benchmarks.parts.offpolicy.turn import InTurn
from buffer.trajectory import FinishReason, Trajectory, TrajectoryGroup, VersionSpan
from buffer.transport.messages import (
    BatchRequest,
    EvaluationQuery,
    EvaluationReports,
    EvaluationRequest,
    Manifest,
    Shard,
)
from buffer.transport.packed_group import PackedGroup, pack_group

ROOT = Path(__file__).parents[2]


class Recorder:
    """A sampler that returns groups of one token with the version that sampled them."""

    def __init__(self, *, ignores_loads: bool = False) -> None:
        self.version, self._ignores_loads = 0, ignores_loads

    def load(self, manifest: Manifest) -> None:
        self.version = 0 if self._ignores_loads else manifest.policy_version

    def groups(self, first_occurrence: int) -> tuple[PackedGroup, ...]:
        return tuple(pack_group(self._group(first_occurrence + index)) for index in range(2))

    def evaluate(self) -> float:
        return self.version / 10

    def _group(self, occurrence: int) -> TrajectoryGroup:
        name = f"{occurrence}.0"
        trajectory = Trajectory(
            trajectory_id=f"{name}.0",
            group_id=name,
            prompt_id=occurrence,
            token_ids=np.array([1, 2], np.int32),
            loss_mask=np.array([False, True]),
            behavior_logprobs=np.array([0.0, -1.0], np.float32),
            policy_versions=(VersionSpan(1, self.version),),
            reward=1.0,
            reward_breakdown={},
            verdict="correct",
            finish_reason=FinishReason.STOP,
        )
        return TrajectoryGroup(name, occurrence, (trajectory,))


def manifest(version: int) -> Manifest:
    return Manifest(version, f"store:{version}", "", "", 0, ())


@pytest.mark.parametrize(
    ("staleness", "sources"),
    [(0, [0, 1, 2, 3, 4]), (1, [0, 0, 1, 2, 3]), (3, [0, 0, 0, 0, 1]), (None, [0, 0, 0, 0, 0])],
)
def test_every_batch_is_sampled_by_the_version_that_the_staleness_says(staleness: int | None, sources: list[int]):
    buffer = InTurn(Recorder(), manifest, staleness, groups_per_batch=2)
    for version, source in enumerate(sources):
        shard = buffer.call(BatchRequest(version, 0, 1))
        assert isinstance(shard, Shard)
        assert {group.header.oldest_version for group in shard.groups} == {source}
        assert shard.staleness == (version - source,) * 2
        assert [group.header.group_id for group in shard.groups] == [f"{2 * version}.0", f"{2 * version + 1}.0"]


def test_a_batch_waits_for_the_version_that_samples_it():
    published = {0: manifest(0)}
    buffer = InTurn(Recorder(), published.get, 0, groups_per_batch=2)
    coming = buffer.request(BatchRequest(1, 0, 1))
    assert not coming.done()
    assert buffer.request(EvaluationQuery(0)).done()
    published[1] = manifest(1)
    buffer.go_on()
    shard = coming.result(0)
    assert isinstance(shard, Shard)
    assert {group.header.oldest_version for group in shard.groups} == {1}


def test_a_batch_of_another_version_ends_the_run():
    buffer = InTurn(Recorder(ignores_loads=True), manifest, 1, groups_per_batch=2)
    buffer.call(BatchRequest(1, 0, 1))
    with pytest.raises(RuntimeError, match=r"batch 2 was to be sampled by version 1 and was by \[0\]"):
        buffer.call(BatchRequest(2, 0, 1))


def test_evaluations_are_of_the_version_asked_for_whatever_samples_the_batches():
    buffer = InTurn(Recorder(), manifest, None, groups_per_batch=2)
    for version in (0, 3):
        buffer.call(EvaluationRequest(version))
    reports = buffer.request(EvaluationQuery(0)).result(0)
    assert isinstance(reports, EvaluationReports)
    assert [(report.policy_version, report.pass_at_1) for report in reports.reports] == [(0, 0.0), (3, 0.3)]


def line(
    correction: str, staleness: int | None, seed: int, values: Sequence[float], ess: float = 1.0
) -> dict[str, Any]:
    curves = {"ess": [1.0, ess], "kl_k3": [0.0, 0.1]}
    pass_at_1 = [[10 * index, value] for index, value in enumerate(values)]
    cell = Cell("ppo", correction, staleness, seed)
    return {**cell.line(), **Scale().line(), "seconds": 1.0, "pass_at_1": pass_at_1, "curves": curves}


def test_a_run_that_is_in_the_file_is_not_repeated(tmp_path: Path):
    path, cells = tmp_path / "runs.jsonl", list(grid("ppo", STALENESS, CORRECTIONS, seeds=2))
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert len(cells) == len(set(cells)) == 2 * (1 + 7 * 6)
    assert missing(cells, Scale(), read_lines(path)) == cells
    for cell in cells[:3]:
        add_line(path, {**cell.line(), **Scale().line()})
    add_line(path, {**cells[3].line(), **Scale(updates=7).line()})
    assert missing(cells, Scale(), read_lines(path)) == cells[3:]


@pytest.mark.parametrize(
    ("values", "final", "collapsed"),
    [
        ([0.3, 0.5, 0.8, 0.9, 1.0], 0.9, False),
        ([0.3, 0.9, 0.5, 0.4, 0.4], 1.3 / 3, True),
        ([0.3, 0.35, 0.2, 0.2, 0.2], 0.2, True),
    ],
)
def test_the_measures_of_a_run(values: list[float], final: float, collapsed: bool):
    found = measure(line("none", 8, 0, values, ess=0.5))
    assert found.final == pytest.approx(final)
    assert found.collapsed is collapsed
    assert (found.ess, found.lowest_ess, found.kl) == pytest.approx((0.75, 0.5, 0.05))


def test_updates_to_a_goal_are_read_off_between_two_evaluations():
    assert updates_to(0.8, [[0, 0.3], [10, 0.7], [20, 0.9]]) == pytest.approx(15.0)
    assert updates_to(0.8, [[0, 0.8]]) == 0
    assert updates_to(0.8, [[0, 0.3], [10, 0.7]]) is None


def test_tables_and_figures_are_made_of_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = [line("none", 0, seed, [0.3, 0.7, 0.9, 0.9, 0.9]) for seed in (0, 1)]
    lines += [line(name, 8, 0, [0.3, 0.5, 0.6, 0.5, 0.4]) for name in ("none", "decoupled_tis")]
    for each in lines:
        add_line(tmp_path / "runs.jsonl", each)
    options = ["--json", str(tmp_path / "runs.jsonl"), "--plot-only", "--plots", str(tmp_path)]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert "0.90 (0.90-0.90)" in printed
    assert "1 never" in printed
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        f"offpolicy_{name}.svg" for name in ("final", "speed", "ess", "distance", "curves")
    }
    first = (tmp_path / "offpolicy_final.svg").read_bytes()
    draw(lines, "ppo", tmp_path)
    assert (tmp_path / "offpolicy_final.svg").read_bytes() == first
    assert len(by_cell(lines, "ppo")["decoupled_tis", 0]) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--plot-only"], "holds no run of this size"),
        (["--staleness", "eight"], "--staleness eight is no number of versions"),
    ],
)
def test_a_mistake_is_one_sentence(options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*options, "--json", str(tmp_path / "none.jsonl")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
