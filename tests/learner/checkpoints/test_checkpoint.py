import errno
import itertools
import json
import pickle
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import learner.checkpoints.checkpoint
import learner.checkpoints.rng
import learner.distributed.deepspeed_engine
from learner.algorithms.ppo import PPO
from learner.checkpoints.checkpoint import (
    CheckpointError,
    CheckpointWriteError,
    load_checkpoint,
    read_state,
    save_checkpoint,
    sound_checkpoint,
)
from learner.checkpoints.manifest import newest_checkpoint
from learner.config import OptimizerConfig
from learner.distributed.deepspeed_engine import TrainingEngine
from tests.learner.ranks import critic_engine, fixed_groups, one_step, policy_engine
from tests.learner.samples import make_batch, plain_model, plain_scores, save_tiny_model

pytestmark = pytest.mark.usefixtures("one_rank")

ADAM = OptimizerConfig(learning_rate=1e-3)
Engines = tuple[TrainingEngine, TrainingEngine]
Damage = Callable[[Path], None]


def engines(folder: Path, stage: int = 0, dtype: torch.dtype = torch.float32) -> Engines:
    return policy_engine(folder, ADAM, stage, dtype), critic_engine(folder, ADAM, stage, dtype)


def steps(pair: Engines, number: int) -> None:
    batch = make_batch(fixed_groups())
    for _ in range(number):
        one_step(*pair, PPO(), batch, 60)


def save(directory: Path, version: int, pair: Engines, base: Path, keep: int = 2, **more: Any) -> Path:
    return save_checkpoint(
        directory, version, *pair, base_path=base, dtype=torch.float32, state={"note": "kept"}, keep=keep, **more
    )


def weights(pair: Engines) -> list[tuple[str, Tensor]]:
    return [named for engine in pair for named in engine.gather(torch.float32)]


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, torch.float32), (2, torch.float32), (3, torch.float32), (0, torch.bfloat16)]
)
def test_a_resumed_run_continues_bit_for_bit(model_folder: Path, tmp_path: Path, stage: int, dtype: torch.dtype):
    straight = engines(model_folder, stage, dtype)
    steps(straight, 4)
    first = engines(model_folder, stage, dtype)
    steps(first, 2)
    checkpoint = save(tmp_path, 2, first, model_folder)
    second = engines(model_folder, stage, dtype)
    load_checkpoint(checkpoint, *second)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(weights(first), weights(second), strict=True))
    steps(second, 2)
    for (name, expected), (_, actual) in zip(weights(straight), weights(second), strict=True):
        assert torch.equal(expected, actual), name


def test_a_checkpoint_holds_the_state_it_was_given(model_folder: Path, tmp_path: Path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nowhere") is None
    checkpoint = save(tmp_path, 12, engines(model_folder), model_folder)
    assert checkpoint == tmp_path / "00000012" == newest_checkpoint(tmp_path)
    assert read_state(checkpoint) == {"policy_version": 12, "num_ranks": 1, "note": "kept"}


def test_an_interrupted_save_leaves_nothing_that_counts(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pair = engines(model_folder)
    save(tmp_path, 1, pair, model_folder)

    def power_cut(_: TrainingEngine, folder: Path) -> None:
        folder.mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingEngine, "save", power_cut)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, pair, model_folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000002.incomplete"]
    assert newest_checkpoint(tmp_path) == tmp_path / "00000001"
    # Saving the same version again starts from an empty folder, not from leftovers.
    (tmp_path / "00000002.incomplete" / "leftover").write_text("half")
    complete = save(tmp_path, 2, pair, model_folder)
    assert newest_checkpoint(tmp_path) == complete
    assert sorted(path.name for path in complete.iterdir()) == [
        "critic_state",
        "learner.json",
        "manifest.json",
        "policy",
        "policy_state",
        "rng",
    ]


def test_it_is_flushed_before_it_gets_its_name(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flushed: set[Path] = set()
    flush_one = learner.checkpoints.checkpoint.sync

    def remember(path: Path) -> None:
        assert path in (tmp_path, tmp_path.parent) or not (tmp_path / "00000001").exists()
        flushed.add(path)
        flush_one(path)

    monkeypatch.setattr(learner.checkpoints.checkpoint, "sync", remember)
    checkpoint = save(tmp_path, 1, engines(model_folder), model_folder)
    written = {tmp_path / "00000001.incomplete" / path.relative_to(checkpoint) for path in checkpoint.rglob("*")}
    assert flushed == written | {tmp_path / "00000001.incomplete", tmp_path, tmp_path.parent}


def test_a_checkpoint_that_may_not_be_named_leaves_nothing(model_folder: Path, tmp_path: Path):
    pair = engines(model_folder)
    save(tmp_path, 1, pair, model_folder)
    seen: list[str] = []

    def refuse() -> bool:
        seen.extend(path.name for path in tmp_path.glob("00000002*/manifest.json*"))
        seen.extend(path.name for path in tmp_path.glob("00000002*"))
        return False

    with pytest.raises(
        CheckpointWriteError, match="policy 2 has no checkpoint: the buffer, which has to record it, is gone"
    ):
        save(tmp_path, 2, pair, model_folder, may_be_named=refuse)
    assert seen == ["manifest.json", "00000002.incomplete"], "asked when all is written, and before it has its name"
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]


def test_only_the_newest_are_kept(model_folder: Path, tmp_path: Path):
    pair = engines(model_folder)
    for version in (8, 9, 10, 100):
        save(tmp_path, version, pair, model_folder, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000010", "00000100"]
    assert newest_checkpoint(tmp_path) == tmp_path / "00000100"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


BREAKAGES = [
    ("learner.json", Path.unlink, "learner.json is missing"),
    ("policy/model.safetensors", truncate, r"policy/model.safetensors has \d+ bytes instead of \d+"),
    ("critic_state/state/mp_rank_00_model_states.pt", flip_a_bit, "has other contents than were written"),
    ("manifest.json", Path.unlink, "manifest.json is missing"),
    ("manifest.json", truncate, "manifest.json cannot be understood"),
]


@pytest.fixture(scope="module")
def two_checkpoints(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, pair = tmp_path_factory.mktemp("two"), engines(model_folder)
    for version in (1, 2):
        save(directory, version, pair, model_folder)
    return directory


@pytest.mark.parametrize(("name", "damage", "problem"), BREAKAGES)
def test_a_broken_checkpoint_is_reported_and_the_one_before_it_used(
    two_checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Damage, problem: str
):
    directory = shutil.copytree(two_checkpoints, tmp_path / "checkpoints")
    (directory / "00000003.incomplete").mkdir()
    assert sound_checkpoint(directory) == directory / "00000002"
    damage(directory / "00000002" / name)
    assert sound_checkpoint(directory) == directory / "00000001"
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "00000002 is broken" in said and re.search(problem, said)
    # The broken checkpoint is renamed, so that no search for the newest checkpoint finds it.
    assert sorted(path.name for path in directory.iterdir()) == ["00000001", "00000002.broken"]


def test_when_no_checkpoint_is_sound_nothing_starts_anew(two_checkpoints: Path, tmp_path: Path):
    directory = shutil.copytree(two_checkpoints, tmp_path / "checkpoints")
    for name in ("00000001", "00000002"):
        truncate(directory / name / "learner.json")
    # Called twice, because a refusal must change nothing.
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* sound .*00000002: learner.json has"):
            sound_checkpoint(directory)


def test_the_newest_sound_one_outlives_broken_ones_with_higher_numbers(model_folder: Path, tmp_path: Path):
    pair = engines(model_folder)
    for version in (2, 9):
        save(tmp_path, version, pair, model_folder)
    truncate(tmp_path / "00000009" / "learner.json")
    assert sound_checkpoint(tmp_path) == tmp_path / "00000002"
    save(tmp_path, 4, pair, model_folder, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000004", "00000009.broken"]
    save(tmp_path, 10, pair, model_folder, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["00000010"]


def test_a_full_disk_leaves_the_checkpoints_there_are(model_folder: Path, tmp_path: Path):
    """Uses a real file system that holds one checkpoint but not two."""
    pair, disk = engines(model_folder), tmp_path / "disk"
    size = sum(path.stat().st_size for path in save(tmp_path / "measured", 1, pair, model_folder).rglob("*"))
    disk.mkdir()
    options = f"size={int(size * 1.5) + 65536}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=False).returncode:
        pytest.skip("no privilege to mount a small file system")
    try:
        save(disk, 1, pair, model_folder)
        for _ in range(2):
            with pytest.raises(CheckpointWriteError):
                save(disk, 2, pair, model_folder)
        assert [path.name for path in disk.iterdir()] == ["00000001"]
        assert sound_checkpoint(disk) == disk / "00000001"
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("stage", [0, 3])
def test_whichever_write_fails_nothing_is_left_and_the_next_attempt_succeeds(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
):
    pair = engines(model_folder, stage)
    steps(pair, 1)
    num_failures = 0
    while not (tmp_path / "00000001").exists():
        with monkeypatch.context() as patch:
            fail_at(patch, num_failures)
            try:
                save(tmp_path, 1, pair, model_folder)
            except CheckpointWriteError as error:
                assert "No space left on device" in str(error)
                assert list(tmp_path.iterdir()) == []
                num_failures += 1
    # Two engines, the export, generators, the manifest, and a flush of each file and folder.
    assert num_failures > 20
    assert sound_checkpoint(tmp_path) == tmp_path / "00000001"


WRITES = [
    (learner.distributed.deepspeed_engine, "write_state"),
    (learner.checkpoints.rng, "write_state"),
    (learner.checkpoints.checkpoint, "write_manifest"),
    (learner.checkpoints.checkpoint, "save_torch_state_dict"),
    (learner.checkpoints.checkpoint, "sync"),
    (shutil, "copy2"),
]


def fail_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """Makes one call fail as on a full disk: number `moment` among all calls that write."""
    calls = itertools.count()

    def guard(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if next(calls) == moment:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **named)

        return call

    for module, name in WRITES:
        monkeypatch.setattr(module, name, guard(getattr(module, name)))


def test_training_state_is_never_unpickled_into_code(model_folder: Path, tmp_path: Path):
    pair = engines(model_folder, 2)
    checkpoint = save(tmp_path, 1, pair, model_folder)
    for path in checkpoint.rglob("*.pt"):
        torch.save({"module": Path("/")}, path)
    with pytest.raises(pickle.UnpicklingError, match="Unsupported"):
        load_checkpoint(checkpoint, *pair)


def test_sharded_state_of_other_ranks_is_refused(model_folder: Path, tmp_path: Path):
    pair = engines(model_folder, 2)
    checkpoint = save(tmp_path, 1, pair, model_folder)
    state = json.loads((checkpoint / "learner.json").read_text())
    (checkpoint / "learner.json").write_text(json.dumps(state | {"num_ranks": 4}))
    with pytest.raises(CheckpointError, match=r"learner\.num_ranks=4 instead of 1"):
        load_checkpoint(checkpoint, *pair)


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]


def test_random_generators_continue(model_folder: Path, tmp_path: Path):
    pair = engines(model_folder)
    draws()
    checkpoint = save(tmp_path, 1, pair, model_folder)
    expected = [draws() for _ in range(3)]
    load_checkpoint(checkpoint, *pair)
    assert [draws() for _ in range(3)] == expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stage", [0, 3])
def test_the_policy_is_a_folder_that_transformers_loads(tmp_path: Path, tied: bool, stage: int):
    base = save_tiny_model(tmp_path / "base", tied=tied)
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    pair = engines(base, stage)
    steps(pair, 1)
    folder = save(tmp_path / "checkpoints", 1, pair, base) / "policy"
    shutil.rmtree(base)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("12+3=15").input_ids) == "12+3=15"
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    model = AutoModelForCausalLM.from_pretrained(folder)
    trained = dict(pair[0].gather(torch.float32))
    assert {f"causal_lm.{name}" for name, _ in model.named_parameters()} == set(trained)
    assert all(torch.equal(p, trained[f"causal_lm.{name}"]) for name, p in model.named_parameters())
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) is tied
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied


def test_the_exported_policy_scores_like_the_engine(model_folder: Path, tmp_path: Path):
    pair, batch = engines(model_folder), make_batch(fixed_groups())
    steps(pair, 2)
    folder = save(tmp_path, 2, pair, model_folder) / "policy"
    (micro,) = batch.microbatches(range(1, 2), 1000)
    trajectory = batch.trajectories[1]
    with torch.no_grad():
        expected = plain_scores(plain_model(folder), trajectory.token_ids, 0.8)[0]
        before = plain_scores(plain_model(model_folder), trajectory.token_ids, 0.8)[0]
        logprobs, _ = pair[0].forward(micro)
    scored = torch.from_numpy(trajectory.loss_mask[1:])
    torch.testing.assert_close(logprobs, expected[scored], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-3)
