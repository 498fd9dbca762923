"""Plans and user files that the launcher's tests share."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.config.plan import RunPlan, plan_run

PlanMaker = Callable[..., RunPlan]


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps tests out of the user's cache."""
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def make_plan(run_dir: Path) -> PlanMaker:
    """The plan for these overrides, in a directory of the test."""

    def make(*overrides: str) -> RunPlan:
        return plan_run([*overrides, f"run_dir={run_dir}"])

    return make


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """Three problems with a blank line between them."""
    records = [{"problem": f"What is {number} + 1?", "answer": str(number + 1)} for number in range(3)]
    lines = [json.dumps(record) for record in records]
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    return path


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """The files of a Hugging Face folder that the launcher reads: a context of 512 tokens and one linear layer."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "max_position_embeddings": 512}))
    layer = {"model.layers.0.self_attn.q_proj.weight": {"dtype": "BF16", "shape": [64, 64], "data_offsets": [0, 8192]}}
    header = json.dumps(layer).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (folder / "tokenizer.json").touch()
    return folder
