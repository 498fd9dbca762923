"""What every benchmark writes beside its figures."""

import json
import os
from pathlib import Path

import pytest

from benchmarks.parts import figures
from benchmarks.parts.figures import Busyness, conditions


def test_the_conditions_are_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    figures.write(tmp_path / "figures.json", {"rate": 3.0})
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["rate"] == 3.0
    assert set(written["conditions"]) == {"load_before", "load_after", "stolen_percent", "was_busy"}
    assert figures.processor_model() in figures.machine()
    assert figures.machine() in capsys.readouterr().err


def test_a_busy_machine_and_stolen_time_are_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    cores = os.cpu_count() or 1
    quiet, busy = Busyness(0.1 * cores, 0.0, 1_000.0), Busyness(0.9 * cores, 0.0, 1_000.0)
    after = Busyness(2.0, 50.0, 2_000.0)
    assert conditions(quiet, after) == {
        "load_before": round(0.1 * cores, 2),
        "load_after": 2.0,
        "stolen_percent": 5.0,
        "was_busy": False,
    }
    assert conditions(busy, after)["was_busy"]
    for before, is_said in ((quiet, False), (busy, True)):
        monkeypatch.setattr(figures, "AT_THE_START", before)
        figures.write(None, {})
        assert ("the machine was busy" in capsys.readouterr().err) is is_said
