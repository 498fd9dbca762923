import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/buffer.py", *options]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env={**os.environ, "CI": ""})


def test_every_way_is_measured_or_skipped_with_a_reason(tmp_path: Path):
    found, drawn = tmp_path / "figures.json", tmp_path / "rates.png"
    printed = run("--quick", "--groups", "64", "--json", str(found), "--plot", str(drawn)).stdout
    figures = json.loads(found.read_text())
    ours = {f"buffer, {durability}" for durability in ("full", "normal", "memory", "normal, CURVE")}
    assert ours | {"ZeroMQ, nothing kept"} <= set(figures["rates"])
    assert len(figures["rates"]) + len(figures["skipped"]) == 8
    assert all(rate["groups_per_second"] > 0 for rate in figures["rates"].values())
    assert all(figures["skipped"].values())
    assert "buffer, normal" in printed
    assert drawn.stat().st_size > 0


def test_memory_is_watched(tmp_path: Path):
    found, drawn = tmp_path / "figures.json", tmp_path / "memory.svg"
    run("--memory-groups", "100", "--json", str(found), "--plot", str(drawn))
    figures = json.loads(found.read_text())
    assert figures["samples"][-1]["groups"] >= 100
    assert figures["log_mb_max"] > 0
    assert drawn.stat().st_size > 0


def test_many_connected_actors_are_served(tmp_path: Path):
    found, drawn = tmp_path / "figures.json", tmp_path / "actors.svg"
    run("--actors", "1", "20", "--quick", "--json", str(found), "--plot", str(drawn))
    figures = json.loads(found.read_text())
    assert {way: [row["actors"] for row in rows] for way, rows in figures["many_actors"].items()} == {
        "plain": [1, 20],
        "CURVE": [1, 20],
    }
    rows = [row for rows in figures["many_actors"].values() for row in rows]
    assert all(row["turn_ms_median"] > 0 and row["memory_mb"] > 0 for row in rows)
    assert drawn.stat().st_size > 0
