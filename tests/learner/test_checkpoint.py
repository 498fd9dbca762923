import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import learner.checkpoint
from learner.checkpoint import load_checkpoint, newest_checkpoint, read_state, save_checkpoint
from learner.config import OptimizerConfig
from learner.engine import TrainingEngine
from learner.ppo import PPO
from tests.learner.ranks import critic_engine, fixed_groups, one_step, policy_engine
from tests.learner.samples import make_batch, plain_model, plain_scores, save_tiny_model

pytestmark = pytest.mark.usefixtures("one_rank")

ADAM = OptimizerConfig(learning_rate=1e-3)
Engines = tuple[TrainingEngine, TrainingEngine]


def engines(folder: Path, stage: int = 0, dtype: torch.dtype = torch.float32) -> Engines:
    return policy_engine(folder, ADAM, stage, dtype), critic_engine(folder, ADAM, stage, dtype)


def steps(pair: Engines, number: int) -> None:
    batch = make_batch(fixed_groups())
    for _ in range(number):
        one_step(*pair, PPO(), batch, 60)


def save(directory: Path, version: int, pair: Engines, base: Path, keep: int = 2) -> Path:
    return save_checkpoint(
        directory, version, *pair, base_path=base, dtype=torch.float32, state={"note": "kept"}, keep=keep
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
    assert read_state(checkpoint) == {"policy_version": 12, "note": "kept"}


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
    # The same version saved again starts from nothing, not from the leftovers.
    (tmp_path / "00000002.incomplete" / "leftover").write_text("half")
    complete = save(tmp_path, 2, pair, model_folder)
    assert newest_checkpoint(tmp_path) == complete
    assert sorted(path.name for path in complete.iterdir()) == [
        "critic_state",
        "learner.json",
        "policy",
        "policy_state",
    ]


def test_it_is_flushed_before_it_gets_its_name(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flushed: set[Path] = set()
    flush_one = learner.checkpoint._flush_one

    def remember(path: Path) -> None:
        assert path == tmp_path or not (tmp_path / "00000001").exists()
        flushed.add(path)
        flush_one(path)

    monkeypatch.setattr(learner.checkpoint, "_flush_one", remember)
    checkpoint = save(tmp_path, 1, engines(model_folder), model_folder)
    written = {tmp_path / "00000001.incomplete" / path.relative_to(checkpoint) for path in checkpoint.rglob("*")}
    assert flushed == written | {tmp_path / "00000001.incomplete", tmp_path}


def test_only_the_newest_are_kept(model_folder: Path, tmp_path: Path):
    pair = engines(model_folder)
    for version in (8, 9, 10, 100):
        save(tmp_path, version, pair, model_folder, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000010", "00000100"]
    assert newest_checkpoint(tmp_path) == tmp_path / "00000100"


def test_a_folder_without_its_last_file_is_not_complete(model_folder: Path, tmp_path: Path):
    for version in (1, 2):
        save(tmp_path, version, engines(model_folder), model_folder)
    (tmp_path / "00000002" / "learner.json").unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "00000001"


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
