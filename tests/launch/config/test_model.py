"""Settings that `model=path` derives from model and machine, and models of the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.config import model
from launch.config.compose import compose_config
from launch.config.model import local_folder, longest_context, num_parameters, vocabulary_size
from launch.config.plan import plan_run
from launch.config.sections import KNOWN


def describe(folder: Path, *, parameters: int = 64, **config: Any) -> None:
    """Make `folder` look like a model with that many rows of 1,000 parameters."""
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **config}))
    shape = [parameters // 1000, 1000]
    header = json.dumps({"model.w.weight": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def test_a_model_of_the_users_gets_settings_for_a_real_model(make_plan: Any, model_folder: Path):
    sections = make_plan(f"model.path={model_folder}").sections
    assert sections["choices"]["model"] == "path"
    assert sections["learner"]["optimizer"]["learning_rate"] == 1e-6
    assert sections["learner"]["optimizer"]["schedule"] == "constant"
    assert sections["learner"]["critic_optimizer"]["learning_rate"] == 1e-5
    assert sections["actor"]["evaluation_temperature"] == 0.0
    assert sections["cluster"]["hung_seconds"] == 600.0
    assert "embedded" not in sections


def test_what_is_typed_and_what_a_recipe_says_win(make_plan: Any, model_folder: Path):
    typed = make_plan(f"model.path={model_folder}", "learner.optimizer.learning_rate=2e-5", "learner=large").sections
    assert typed["learner"]["optimizer"]["learning_rate"] == 2e-5
    recipe = compose_config(["experiment=grpo_demo"], KNOWN)
    assert recipe.learner.optimizer.learning_rate == 5e-6
    assert recipe.learner.optimizer.schedule == "cosine"


def test_the_embedded_model_keeps_its_settings(make_plan: Any):
    sections = make_plan().sections
    assert sections["learner"]["optimizer"]["learning_rate"] == 3e-4
    assert sections["model"]["dtype"] == "float32"
    assert sections["cluster"]["hung_seconds"] == 60.0


@pytest.mark.parametrize(("cuda", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_the_number_format_follows_the_machine(
    make_plan: Any, model_folder: Path, monkeypatch: pytest.MonkeyPatch, cuda: bool, dtype: str
):
    monkeypatch.setattr(model, "has_cuda", lambda: cuda)
    sections = make_plan(f"model.path={model_folder}").sections
    assert (sections["model"]["dtype"], sections["actor"]["dtype"], sections["learner"]["publish_dtype"]) == (
        dtype,
    ) * 3
    apart = make_plan(f"model.path={model_folder}", "actor.dtype=bfloat16").sections
    assert (apart["model"]["dtype"], apart["actor"]["dtype"]) == (dtype, "bfloat16")


@pytest.mark.parametrize(
    ("config", "overrides", "expected"),
    [
        ({"max_position_embeddings": 32768}, [], 40 + 2048),
        ({"max_position_embeddings": 32768}, ["max_new_tokens=3000"], 3000 + 2048),
        ({"max_position_embeddings": 32768}, ["actor.evaluation_max_new_tokens=8000"], 8000 + 2048),
        ({"max_position_embeddings": 1024}, [], 1024),
        ({}, [], 40 + 2048),
        ({"max_position_embeddings": 32768, "sliding_window": 512}, [], 512),
        ({"max_position_embeddings": 32768, "sliding_window": 512, "use_sliding_window": False}, [], 40 + 2048),
        ({"max_position_embeddings": 32768}, ["model.max_tokens=300"], 300),
    ],
)
def test_the_context_has_room_for_a_prompt_and_a_completion(
    make_plan: Any, model_folder: Path, config: dict[str, Any], overrides: list[str], expected: int
):
    describe(model_folder, **config)
    sections = make_plan(f"model.path={model_folder}", *overrides).sections
    assert sections["model"]["max_tokens"] == sections["actor"]["max_tokens"] == expected


def test_the_context_has_room_for_every_turn(make_plan: Any, model_folder: Path):
    describe(model_folder, max_position_embeddings=1 << 17)
    plan = make_plan("task=sokoban", f"model.path={model_folder}", "max_new_tokens=100")
    assert plan.task.max_turns > 1
    assert plan.sections["model"]["max_tokens"] == 100 * plan.task.max_turns + 2048


@pytest.mark.parametrize(
    ("parameters", "overrides", "stage"),
    [
        (10_000, [], 0),
        (7_000_000_000, [], 0),
        (7_000_000_000, ["learner.num_ranks=2"], 3),
        (500_000_000, ["learner.num_ranks=2"], 0),
        (7_000_000_000, ["learner.cpu_offload=true"], 1),
        (7_000_000_000, ["learner.num_ranks=2", "learner.zero_stage=2"], 2),
        (7_000_000_000, ["learner.num_ranks=2", "learner=large"], 3),
    ],
)
def test_the_zero_stage_follows_the_size(
    make_plan: Any, model_folder: Path, parameters: int, overrides: list[str], stage: int
):
    describe(model_folder, parameters=parameters)
    assert num_parameters(model_folder) == parameters
    assert make_plan(f"model.path={model_folder}", *overrides).sections["learner"]["zero_stage"] == stage


def test_a_model_whose_files_do_not_say_is_estimated_by_their_size(model_folder: Path):
    (model_folder / "model.safetensors").unlink()
    (model_folder / "pytorch_model.bin").write_bytes(bytes(2000))
    assert num_parameters(model_folder) == 1000
    (model_folder / "config.json").write_text("{}")
    assert longest_context(model_folder) == 0


@pytest.fixture
def hub(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with one model, in the layout of huggingface_hub, without a network."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    snapshot = cache / "models--acme--small" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    model_folder.rename(snapshot)
    (cache / "models--acme--small" / "refs").mkdir()
    (cache / "models--acme--small" / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_model_of_the_hub_is_found_in_its_cache(hub: Path, make_plan: Any):
    assert local_folder("hf:acme/small") == hub
    sections = make_plan("model.path=hf:acme/small").sections
    assert sections["model"]["path"] == sections["actor"]["model_path"] == str(hub)
    assert sections["model"]["max_tokens"] == 512


@pytest.mark.parametrize("path", ["hf:acme/other", "hf:acme/small@v2", "hf:", "hf:a b/c"])
def test_a_model_the_hub_does_not_have_is_one_sentence(hub: Path, path: str):
    with pytest.raises(ValueError) as caught:
        plan_run([f"model.path='{path}'"])
    said = str(caught.value)
    assert said.startswith(f"model.path={path} ")
    assert "or give a folder" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"vocab_size": 100}, 100),
        ({"text_config": {"vocab_size": 200}, "vision_config": {"vocab_size": 9}}, 200),
        ({}, 0),
        ({"vocab_size": "many"}, 0),
        (None, 0),
    ],
)
def test_the_vocabulary_bounds_the_token_ids_that_actors_may_deliver(tmp_path: Path, config: Any, size: int):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert vocabulary_size(tmp_path) == size
