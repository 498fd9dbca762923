"""`benchmarks/plot_run.py` on event files like those of the learner."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from torch.utils.tensorboard import SummaryWriter

from benchmarks.plot_run import PANELS, main, parse_runs, read_run

ROOT = Path(__file__).parents[2]
PASS_AT_1, REWARD = "evaluation/pass_at_1", "reward/mean"


def write(run_dir: Path, scalars: dict[str, dict[int, float]], purge_step: int | None = 0) -> None:
    """Write event files with one value per tag and version, and one tag that no panel shows."""
    with SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step) as writer:
        writer.add_scalar("learner/wait_seconds", 1.0, 0)
        for tag, values in scalars.items():
            for version, value in values.items():
                writer.add_scalar(tag, value, version)


def whole_run(run_dir: Path, rise: float = 0.01) -> dict[str, dict[int, float]]:
    scalars = {panel.tag: {version: 0.25 + rise * version for version in range(1, 31)} for panel in PANELS[1:]}
    scalars[PASS_AT_1] = {0: 0.5, 15: 0.75, 30: 1.0}
    write(run_dir, scalars)
    return scalars


def texts(svg: Path) -> str:
    """All text of an SVG file whose text was not converted to paths."""
    return " ".join(" ".join(element.itertext()) for element in ElementTree.parse(svg).findall(".//{*}text"))


@pytest.fixture
def svg_text():
    with mpl.rc_context({"svg.fonttype": "none"}):
        yield


def test_every_written_value_is_in_the_figure_and_in_the_json(tmp_path: Path, svg_text: None):
    written = {"PPO": whole_run(tmp_path / "a"), "GRPO": whole_run(tmp_path / "b", rise=0.02)}
    output, series = tmp_path / "figure.svg", tmp_path / "series.json"
    arguments = [str(output), f"PPO={tmp_path / 'a'}", f"GRPO={tmp_path / 'b'}", "--json", str(series)]
    assert main([*arguments, "--title", "Two runs"]) == 0
    read = json.loads(series.read_text())
    assert list(read) == ["PPO", "GRPO"]
    for label, scalars in written.items():
        assert set(read[label]) == {panel.tag for panel in PANELS}
        for tag, values in scalars.items():
            assert [version for version, _ in read[label][tag]] == sorted(values)
            assert [value for _, value in read[label][tag]] == pytest.approx([values[v] for v in sorted(values)])
    shown = texts(output)
    for word in ("PPO", "GRPO", "Two runs", "policy version", *(panel.title for panel in PANELS)):
        assert word in shown
    assert "not recorded" not in shown


def test_quick_and_a_second_run_draw_the_same_file(tmp_path: Path):
    whole_run(tmp_path / "a")
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    assert main([str(first), f"a={tmp_path / 'a'}"]) == 0
    assert main([str(second), f"a={tmp_path / 'a'}", "--quick"]) == 0
    assert first.read_bytes() == second.read_bytes()


def test_a_resumed_run_shows_what_was_trained_again(tmp_path: Path):
    write(tmp_path, {REWARD: {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}})
    write(tmp_path, {REWARD: {3: 0.7, 4: 0.8}}, purge_step=3)
    series = read_run("resumed", tmp_path).series[REWARD]
    assert [version for version, _ in series] == [1, 2, 3, 4]
    assert [value for _, value in series] == pytest.approx([0.1, 0.2, 0.7, 0.8])


def test_a_tag_that_was_never_written_is_said_to_be_missing(tmp_path: Path, svg_text: None):
    write(tmp_path / "a", {REWARD: {1: float("nan"), 2: 0.5}})
    output, series = tmp_path / "figure.svg", tmp_path / "series.json"
    assert main([str(output), f"a={tmp_path / 'a'}", "--json", str(series)]) == 0
    assert texts(output).count("not recorded") == len(PANELS) - 1
    assert json.loads(series.read_text()) == {"a": {REWARD: [[1, None], [2, 0.5]]}}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["figure.svg", "runs/a"], "'runs/a' is not LABEL=RUN_DIR"),
        (["figure.svg", "=runs/a"], "'=runs/a' is not LABEL=RUN_DIR"),
        (["figure.svg", "a=run", "a=run"], "the label 'a' is given twice"),
        (["figure.bmp", "a=run"], "figure.bmp does not end in one of .svg, .png, .pdf"),
        (["absent/figure.svg", "a=run"], "the folder absent"),
        (["figure.svg", "a=absent"], "a: absent is not a folder"),
        (["figure.svg", "a=empty"], "a: empty/tensorboard holds no event files"),
        (["figure.svg", "a=other"], "a: the event files in other/tensorboard have none of evaluation/pass_at_1"),
        (["figure.svg", "a=run", "--json", "absent/series.json"], "absent/series.json"),
    ],
)
def test_bad_input_gives_one_sentence_and_status_2(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run", {REWARD: {1: 0.5}})
    write(tmp_path / "other", {})
    (tmp_path / "empty").mkdir()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert error.count("\n") == 1


def test_a_label_ends_at_the_first_equals_sign():
    assert parse_runs(["PPO=/runs/lr=3e-4"]) == [("PPO", Path("/runs/lr=3e-4"))]


def test_it_runs_as_a_script_from_anywhere(tmp_path: Path):
    write(tmp_path / "a", {REWARD: {1: 0.5}})
    command = [sys.executable, str(ROOT / "benchmarks" / "plot_run.py"), "figure.png", "a=a"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
