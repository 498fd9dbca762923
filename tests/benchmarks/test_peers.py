"""The figures of the comparison with other systems; no system is started here."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.parts.marked_lines import MARK, heard
from benchmarks.parts.peers.environment import peer_python
from benchmarks.parts.peers.report import markdown, measured, measures, plot, ratio, spread
from benchmarks.parts.peers.run import run_trl
from benchmarks.parts.peers.work import Scale, Work
from benchmarks.peers import LABELS, main, prepare


def run(seconds_per_update: float, pass_at_1: list[list[float]], difference: float | None = None) -> dict[str, Any]:
    """Ten updates of four completions of five tokens, the first 30 s after the command."""
    return {
        "stamps": [30.0 + seconds_per_update * index for index in range(10)],
        "tokens": [20] * 10,
        "generated": [20.0 * (index + 1) + 40 for index in range(10)],
        "wall_seconds": 60.0,
        "resident_mb": 2000.0,
        "shared_once_mb": 1000.0,
        "logprob_difference": difference,
        "pass_at_1": pass_at_1,
    }


def figures() -> dict[str, Any]:
    learns: list[list[float]] = [[0, 0.3], [5, 0.7], [10, 0.9]]
    return {
        "scale": {"model": "small", "updates": 10, "groups_per_batch": 2, "samples_per_group": 2},
        "ways": {
            "slipstream": [run(0.5, learns), run(0.4, learns)],
            "slipstream-2": [run(0.25, learns), run(0.4, learns)],
            "generate-1": [run(1.0, learns), run(1.2, [[0, 0.3], [5, 0.4], [10, 0.5]])],
            "vllm-1": [run(2.0, learns, 0.01)],
        },
        "labels": LABELS,
        "skipped": {"vllm-2": "TRL (vllm): it ended"},
        "command": "python benchmarks/peers.py",
        "machine": "2 cores",
        "versions": {},
    }


def test_rates_leave_the_first_updates_out():
    found = measured(run(0.5, [[0, 0.3], [5, 0.7], [10, 0.9]]), batch=4)
    assert found.samples_per_second == pytest.approx(8.0)
    assert found.trained_per_second == found.generated_per_second == pytest.approx(40.0)
    assert (found.startup_seconds, found.final) == (30.0, 0.9)
    # Version 7.5: half-way between the ends of updates 7 and 8.
    assert found.goal_seconds == pytest.approx(30.0 + 6.5 * 0.5)
    assert measured(run(0.5, [[0, 0.9], [10, 0.9]]), batch=4).goal_seconds == 0.0
    assert measured(run(0.5, [[0, 0.3], [10, 0.8]]), batch=4).goal_seconds == pytest.approx(34.5)


def test_ratios_pair_the_runs_that_took_turns():
    found = measures(figures())
    ratios = ratio(found["slipstream"], found["generate-1"], "samples_per_second")
    assert ratios == pytest.approx([2.0, 3.0])
    assert spread([2.0, 1.0, 4.0], 1) == "2.0 (1.0 to 4.0)"
    assert spread([12.4, None], 0) == "12, 1 of 2 never"
    assert spread([None, None], 0) == "2 of 2 never"


def test_recorded_figures_give_the_table_and_the_same_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recorded = tmp_path / "figures.json"
    recorded.write_text(json.dumps(figures()))
    arguments = ["--show", str(recorded), "--markdown", str(tmp_path / "table.md"), "--plots", str(tmp_path)]
    # A way is missing, and the status says so.
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "TRL, vLLM, two threads: not measured: TRL (vllm): it ended" in printed
    assert "log-probabilities differ by 0.0100 at most" in printed
    table = (tmp_path / "table.md").read_text()
    assert table == markdown(figures())
    assert "| Slipstream / this, samples/s |  |  | 2.50 (2.00 to 3.00) | 4.00 |" in table
    assert "| Slipstream, two actors / this, samples/s |  |  | 3.50 (3.00 to 4.00) | 8.00 |" in table
    assert {line.count("|") for line in table.splitlines()} == {6}
    first = (tmp_path / "peers.svg").read_bytes()
    plot(figures(), tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ways", "verl"], "--ways verl is unknown; choose of slipstream, slipstream-2, generate-1"),
        (["--updates", "4"], "--updates 4 is too few: 3 warm up"),
        (["--groups", "0"], "--groups 0 leaves no prompt in an update"),
        (["--runs", "0"], "--runs 0 leaves nothing to measure"),
        (["--plots", "/no/such/folder"], "--plots /no/such/folder is no folder"),
        (["--show", "/no/such/file"], "--show /no/such/file is no file"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1


def test_a_peer_gets_the_settings_of_our_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.peers.prepare_base_model", lambda plan, embedded, progress: tmp_path / "base")
    scale = Scale(updates=5, checkpoint_every=5)
    given = prepare(scale, tmp_path, Console()).work("generate", 1, 7, scale, tmp_path / "output")
    given.write(tmp_path / "work.json")
    assert Work.read(tmp_path / "work.json") == given
    assert (given.groups_per_batch, given.samples_per_group, given.max_new_tokens, given.temperature) == (16, 8, 64, 1)
    assert given.learning_rates[0] == pytest.approx(3e-4 / 4)
    assert max(given.learning_rates) == pytest.approx(3e-4)
    rows = given.rows()
    assert len(rows) == 5 * 16
    for row in rows:
        first, second = row["prompt"].rstrip("=").split("+")
        assert int(first) + int(second) == int(row["gold"])


def work(folder: Path, updates: int) -> Work:
    return Work(
        mode="generate",
        model="base",
        problems="problems.jsonl",
        output=str(folder / "output"),
        num_threads=1,
        seed=0,
        groups_per_batch=2,
        samples_per_group=2,
        max_new_tokens=64,
        max_tokens=256,
        temperature=1.0,
        checkpoint_every=10,
        learning_rates=[1e-4] * updates,
        betas=[0.9, 0.95],
        max_grad_norm=1.0,
        clip=0.2,
        rows_per_microbatch=4,
    )


def script(folder: Path, *lines: str) -> Path:
    """A script in place of a peer's Python."""
    path = folder / "python"
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def test_a_peer_that_ends_badly_is_reported_with_its_last_words(tmp_path: Path):
    python = script(tmp_path, "echo starting", "echo 'no module named trl' >&2", "exit 3")
    with pytest.raises(ValueError, match=r"TRL \(generate\): .* status 3: starting / no module named trl"):
        run_trl(work(tmp_path, updates=1), python, tmp_path)


def test_a_run_that_stops_early_is_no_figure(tmp_path: Path):
    update = json.dumps({"version": 1, "time": 0.0, "num_tokens": 12})
    python = script(tmp_path, "echo loading", f"echo '{MARK}{update}'")
    with pytest.raises(ValueError, match="made 1 of 5 updates"):
        run_trl(work(tmp_path, updates=5), python, tmp_path)
    assert run_trl(work(tmp_path, updates=1), python, tmp_path).tokens == [12]


def test_only_marked_lines_are_heard():
    assert list(heard(["loading", f'{MARK}{{"version": 1}}', "done"])) == [{"version": 1}]


def test_an_environment_is_made_once_and_a_failure_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr("benchmarks.parts.peers.environment.subprocess.run", _install(fails=False))
    first = peer_python("trl", ["trl==1"], tmp_path, said.append)
    assert peer_python("trl", ["trl==1"], tmp_path, said.append) == first
    assert len(said) == 1
    assert peer_python("trl", ["trl==2"], tmp_path, said.append) != first
    monkeypatch.setattr("benchmarks.parts.peers.environment.subprocess.run", _install(fails=True))
    with pytest.raises(ValueError, match=r"No matching distribution; repair that .* --ways slipstream"):
        peer_python("trl", ["trl==3"], tmp_path, said.append)


def _install(*, fails: bool) -> Any:
    """A function in place of the commands of venv and pip."""

    class Ended:
        returncode = int(fails)
        stdout, stderr = "", "Looking\nNo matching distribution\n"

    def started(command: tuple[str, ...], **named: Any) -> Ended:
        if command[0] == sys.executable:
            Path(command[-1], "bin").mkdir(parents=True)
        return Ended()

    return started
