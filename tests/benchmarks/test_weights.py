import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import weights
from benchmarks.parts.weights.deltas import compare
from buffer.weights.config import MEMORY_VARIABLE


def test_the_shapes_are_those_of_the_models_they_are_named_after():
    sizes = {
        name: sum(torch.Size(shape).numel() for shape in weights.shapes_of(name).values()) for name in weights.MODELS
    }
    assert sizes["0.5B"] == 494_032_768 and sizes["1.5B"] == 1_543_714_304


def test_a_way_is_measured_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("TMPDIR", MEMORY_VARIABLE):
        monkeypatch.setenv(name, str(tmp_path))
    tensors = weights.parameters(weights.shapes_of("tiny"))
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    [row] = weights.measure("Slipstream, network, deltas", tensors, 1, 1)
    assert 0 < row["stall_seconds"] < row["ready_seconds"] and row["pause_seconds"] > 0
    assert 0 < row["link_bytes"] < 0.1 * num_bytes
    assert list(tmp_path.iterdir()) == []
    columns = weights.spread({key: [value] for key, value in row.items()})
    ways = [{"model": "tiny", "gib": 0.1, "way": "Slipstream", "actors": 1, "skipped": ""} | columns]
    ways.append({"model": "tiny", "gib": 0.1, "way": "gloo", "actors": 4, "skipped": "no memory"})
    old = np.arange(64, dtype=np.uint16).view(np.uint8)
    delta = {"dtype": "bfloat16", "learning_rate": 1e-6, "versions_behind": 1} | compare(old, old.copy(), 2)
    assert delta["changed_share"] == 0
    figures = json.loads(json.dumps({"ways": ways, "deltas": [delta]}))
    console = Console(record=True, width=160, file=io.StringIO())
    weights.show(figures, console)
    assert "skipped: no memory" in console.export_text()
    weights.plot(figures, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 0
