"""The command `slipstream` runs every entry point and refuses unknown subcommands."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from launch.command import main

ROOT = Path(__file__).parents[2]


def test_the_package_names_the_command():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"slipstream": "slipstream.launch.command:main"}


def test_check_and_train_take_the_same_settings(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["check", f"run_dir={run_dir}", "total_steps=30"]) == 0
    assert "would start" in capsys.readouterr().out
    assert not run_dir.exists()
    assert main(["train", f"run_dir={run_dir}", "total_stps=30"]) == 2
    assert "did you mean total_steps?" in capsys.readouterr().err


def test_inspect_looks_into_a_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_grade_grades_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = tmp_path / "answers.jsonl"
    data.write_text('{"completion": "It is \\\\boxed{42}.", "gold": "42", "expected": true}\n')
    assert main(["grade", "--data", str(data), "--reward", "accuracy"]) == 0


def test_help_names_every_word_and_another_one_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"slipstream {word}" in shown for word in ("train", "check", "inspect", "grade", "install"))
    assert main(["evaluat"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_it_runs_under_the_name_that_the_wheel_gives_it(tmp_path: Path):
    """Run from another folder, with the packages below `slipstream`, as pip installs them."""
    (tmp_path / "slipstream").symlink_to(ROOT)
    code = "import sys; from slipstream.launch.command import main; sys.exit(main(['check', 'total_stps=3']))"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 2
    assert "did you mean total_steps?" in ended.stderr
