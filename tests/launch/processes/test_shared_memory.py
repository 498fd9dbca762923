"""The shared memory that a run's versions need, and the message if there is too little."""

from pathlib import Path
from typing import Any

import pytest

from buffer.weights.device_handle import RECORD_BYTES
from launch.config import cores
from launch.config.adapters import folder_shapes
from launch.processes import shared_memory
from launch.processes.shared_memory import shared_memory_shortage, version_bytes
from tests.learner.samples import save_tiny_model

MB = 1_000_000


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Simulate this much free memory."""

    def be(free: int, memory: int = 1 << 40) -> None:
        monkeypatch.setattr(shared_memory, "free_bytes", lambda: free)
        monkeypatch.setattr(shared_memory, "available_memory_bytes", lambda: memory)

    return be


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "tiny", heads=2)


def num_parameters(model: Path) -> int:
    from transformers import AutoModelForCausalLM

    return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(model).parameters())


@pytest.mark.parametrize(("dtype", "number_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_a_version_has_every_parameter_in_the_published_type(
    make_plan: Any, model: Path, dtype: str, number_bytes: int
):
    plan = make_plan(f"model.path={model}", f"model.dtype={dtype}", "model.max_tokens=64", "max_new_tokens=8")
    bare = number_bytes * num_parameters(model)
    assert bare <= version_bytes(plan.sections) <= bare + 64 * len(folder_shapes(model))


def test_files_that_do_not_say_what_is_in_them_count_whole(make_plan: Any, model_folder: Path):
    (model_folder / "model.safetensors").unlink()
    (model_folder / "pytorch_model.bin").write_bytes(bytes(5000))
    assert version_bytes(make_plan(f"model.path={model_folder}").sections) == 5000


@pytest.mark.parametrize(
    ("overrides", "layers"),
    [
        # hidden 32, intermediate 48, one of two heads' keys and values.
        ([], {(32, 32): 2, (16, 32): 2, (48, 32): 2, (32, 48): 1}),
        (["learner.lora.target_modules=[q_proj]"], {(32, 32): 1}),
    ],
)
def test_of_adapters_only_their_matrices_count(
    make_plan: Any, model: Path, overrides: list[str], layers: dict[tuple[int, int], int]
):
    limits = ("model.max_tokens=64", "max_new_tokens=8")
    plan = make_plan(f"model.path={model}", *limits, "learner.lora.rank=4", *overrides)
    numbers = 2 * sum(4 * (rows + columns) * count for (rows, columns), count in layers.items())
    assert version_bytes(plan.sections) == 4 * numbers + 2 * 2 * 64 * sum(layers.values())
    merged = make_plan(f"model.path={model}", *limits, "learner.lora.rank=4", "learner.lora.publish=merged", *overrides)
    assert version_bytes(merged.sections) >= 4 * num_parameters(model)


def test_versions_on_a_device_are_records(make_plan: Any, model_folder: Path):
    sections = make_plan(f"model.path={model_folder}").sections
    on_device = {**sections, "weights": {**sections["weights"], "transport": "ipc", "deltas": False}}
    assert version_bytes(on_device) == RECORD_BYTES


def test_one_sentence_says_what_is_wanted_what_is_free_and_the_way_out(
    machine: Any, make_plan: Any, model_folder: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shared_memory, "version_bytes", lambda _: 100 * MB)
    plan = make_plan(f"model.path={model_folder}", "weights.keep_versions=20")
    # 20 kept, one being written, two retired.
    machine(free=2300 * MB)
    assert shared_memory_shortage(plan) == ""
    machine(free=2300 * MB - 1)
    assert shared_memory_shortage(plan) == (
        "note: the weights would take up to 2,300.0 MB of shared memory (23 versions of 100.0 MB), but /dev/shm has"
        f" 2,300.0 MB free, so they lie in {run_dir}/weights, which is slower; --shm-size=3g gives a container more of"
        " it"
    )


def test_shared_memory_beyond_the_containers_limit_is_none(machine: Any, make_plan: Any, model_folder: Path):
    machine(free=1 << 40, memory=50_000)
    said = shared_memory_shortage(make_plan(f"model.path={model_folder}"))
    assert "0.1 MB of memory are free" in said and "--memory" in said and "--shm-size" not in said


def test_who_wants_no_shared_memory_hears_nothing(machine: Any, make_plan: Any, model_folder: Path):
    machine(free=0)
    assert shared_memory_shortage(make_plan(f"model.path={model_folder}"))
    assert shared_memory_shortage(make_plan(f"model.path={model_folder}", "weights.shared_memory=false")) == ""


def test_a_machine_without_shared_memory_has_none_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path / "none")
    assert shared_memory.free_bytes() == 0
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    assert shared_memory.free_bytes() > 0


def test_workers_that_exchange_results_need_room_too(
    machine: Any, make_plan: Any, model_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cores, "num_usable_cores", lambda: 1 + 2 * 2 * 8)
    monkeypatch.setattr(shared_memory, "has_cuda", lambda: False)
    (model_folder / "config.json").write_text('{"num_attention_heads": 2, "max_position_embeddings": 512}')
    plan = make_plan(f"model.path={model_folder}", "actor.tensor_parallel_size=2", "cluster.num_actors=2")
    versions = 6 * version_bytes(plan.sections)
    machine(free=versions + 2 * 2 * 8 * (4 << 20))
    assert shared_memory_shortage(plan) == ""
    machine(free=versions + 2 * 2 * 8 * (4 << 20) - 1)
    assert "and 134.2 MB that vLLM's workers need in any case" in shared_memory_shortage(plan)
