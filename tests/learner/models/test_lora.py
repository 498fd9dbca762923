"""LoRA under DeepSpeed: what is trained, published and saved."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from buffer.config import read_section
from learner.algorithms.grpo import GRPO
from learner.checkpoints.checkpoint import CheckpointError, check_same_adapters, load_checkpoint, save_checkpoint
from learner.config import LearnerConfig, LoraConfig, OptimizerConfig
from learner.distributed.deepspeed_engine import TrainingEngine
from learner.models.lora import adapter_tensors
from learner.models.policy import PolicyModel
from tests.learner.samples import CPU, plain_model
from tests.learner.scripted_run import ScriptedRun
from tests.learner.test_config import LEARNER

pytestmark = pytest.mark.usefixtures("one_rank")

LORA = LoraConfig(rank=2, alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
ADAM = OptimizerConfig(learning_rate=0.05, eps=1e-3)
INPUTS: tuple[Any, ...] = (torch.arange(3, 15), torch.arange(12) % 7, (0, 7, 12), torch.tensor([1, 2, 5, 9, 11]))
"""Two packed sequences and their scored tokens."""


def load(folder: Path, lora: LoraConfig | None = LORA, dtype: torch.dtype = torch.float32) -> PolicyModel:
    torch.manual_seed(3)
    return PolicyModel.load(folder, dtype=dtype, temperature=0.8, checkpointing=False, lora=lora)


def engine(folder: Path, stage: int = 0, dtype: torch.dtype = torch.float32, **named: Any) -> TrainingEngine:
    is_bfloat16 = dtype == torch.bfloat16
    return TrainingEngine(
        load(folder, dtype=dtype), ADAM, zero_stage=stage, bfloat16=is_bfloat16, cpu_offload=False, device=CPU, **named
    )


def train(engine: TrainingEngine, num_steps: int = 2) -> TrainingEngine:
    """Train towards unlikely tokens, so that every step changes all adapters."""
    for _ in range(num_steps):
        logprobs, _ = engine._engine(*INPUTS)
        engine.backward(-logprobs.sum(), last=True)
        engine.step(ADAM.learning_rate)
    return engine


def whole(engine: TrainingEngine) -> dict[str, Tensor]:
    return {name.removeprefix("causal_lm."): tensor for name, tensor in engine.gather(torch.float32)}


def adapters(engine: TrainingEngine) -> dict[str, Tensor]:
    return dict(engine.gather(torch.float32, adapters=True))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def trained(model_folder: Path, one_rank: None) -> TrainingEngine:
    return train(engine(model_folder))


def test_only_the_named_layers_move_and_the_head_stays_tied(model_folder: Path, trained: TrainingEngine):
    base, found = dict(plain_model(model_folder).named_parameters()), whole(trained)
    assert found.keys() == base.keys()
    moved = {name for name in base if not torch.equal(found[name], base[name])}
    assert moved == {name for name in base if name.endswith(tuple(f"{part}.weight" for part in LORA.target_modules))}
    assert "lm_head.weight" not in found


def test_before_the_first_step_every_bit_is_the_bases(model_folder: Path):
    base = dict(plain_model(model_folder).named_parameters())
    found = whole(engine(model_folder, dtype=torch.float32))
    assert all(torch.equal(found[name], base[name]) for name in base)


def test_the_whole_weights_score_as_the_network_with_adapters_does(model_folder: Path, trained: TrainingEngine):
    plain = load(model_folder, None)
    trained.copy_to(plain)
    with torch.no_grad():
        expected = trained._engine(*INPUTS)
        torch.testing.assert_close(plain(*INPUTS), expected, rtol=1e-4, atol=1e-5)
        assert (expected[0] - load(model_folder, None)(*INPUTS)[0]).abs().max() > 0.1


def test_the_steps_are_those_of_plain_torch_on_the_product(model_folder: Path, trained: TrainingEngine):
    """The gradient of W + s B A by hand: dA = s B^T dW, dB = s dW A^T."""
    plain, scale = load(model_folder, None), LORA.alpha / LORA.rank
    matrices = {
        name.partition(".lora_")[0] + ".weight": (torch.zeros(0), torch.zeros(0))
        for name in adapters(engine(model_folder))
    }
    start = adapters(engine(model_folder))
    base = {name: dict(plain.named_parameters())[name].detach().clone() for name in matrices}
    for name in matrices:
        layer = name.removesuffix(".weight")
        matrices[name] = start[f"{layer}.lora_A.weight"], start[f"{layer}.lora_B.weight"] / scale
    flat = [matrix for pair in matrices.values() for matrix in pair]
    optimizer = torch.optim.AdamW(flat, lr=ADAM.learning_rate, betas=ADAM.betas, eps=ADAM.eps, weight_decay=0.0)
    for _ in range(2):
        plain.zero_grad()
        (-plain(*INPUTS)[0].sum()).backward()
        for name, (down, up) in matrices.items():
            gradient = plain.get_parameter(name).grad
            assert gradient is not None
            down.grad, up.grad = scale * up.T @ gradient, scale * gradient @ down.T
        torch.nn.utils.clip_grad_norm_(flat, 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, (down, up) in matrices.items():
                plain.get_parameter(name).copy_(base[name] + scale * up @ down)
    assert_close(whole(trained), {name.removeprefix("causal_lm."): p.detach() for name, p in plain.named_parameters()})


def test_adapters_are_two_float32_matrices_a_layer_and_nothing_else(model_folder: Path):
    found = {tensor.name: tensor.value() for tensor in adapter_tensors(load(model_folder, dtype=torch.bfloat16))}
    layers = {f"causal_lm.model.layers.{i}" for i in range(2)}
    parts = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    assert found.keys() == {f"{l}.{p}.lora_{m}.weight" for l in layers for p in parts for m in "AB"}  # noqa: E741
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert {tensor.shape[0 if ".lora_A" in name else 1] for name, tensor in found.items()} == {LORA.rank}


def test_without_names_all_linear_layers_of_the_decoder_train(model_folder: Path):
    policy = load(model_folder, LoraConfig(rank=1))
    names = {name.split(".")[-4] for name, p in policy.named_parameters() if p.requires_grad}
    assert names == {*("q_proj", "k_proj", "v_proj", "o_proj"), *("gate_proj", "up_proj", "down_proj")}


def test_weights_held_in_another_form_are_taken_from_the_full_ones(model_folder: Path, trained: TrainingEngine):
    """As with a base in four bits, the frozen weights come from `full_base` and not from the network."""
    other = train(engine(model_folder, full_base=partial(load, model_folder, None)))
    expected = whole(trained)
    with torch.no_grad():
        for parameter in other._engine.module.parameters():
            parameter.mul_(1.0 if parameter.requires_grad else 0.0)
    assert_close(whole(other), expected)


@pytest.mark.parametrize(("stage", "dtype"), [(0, torch.float32), (3, torch.float32), (0, torch.bfloat16)])
def test_a_resumed_run_continues_bit_for_bit(
    model_folder: Path, tmp_path: Path, trained: TrainingEngine, stage: int, dtype: torch.dtype
):
    straight = train(engine(model_folder, stage, dtype))
    if stage:
        # Every ZeRO stage publishes the same weights.
        assert_close(whole(straight), whole(trained))
        assert_close(adapters(straight), adapters(trained))
    how: dict[str, Any] = {"base_path": model_folder, "dtype": dtype, "lora": LORA, "state": {}, "keep": 1}
    checkpoint = save_checkpoint(tmp_path, 2, straight, None, **how)
    resumed = engine(model_folder, stage, dtype)
    load_checkpoint(checkpoint, resumed, None)
    for one, other in zip(train(straight).gathered(), train(resumed).gathered(), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1]), one[0]
    # The files contain the adapters, their optimizer state and names. The frozen weights alone would be larger.
    written = sum(path.stat().st_size for path in (checkpoint / "policy_state").rglob("*.pt"))
    assert written < 4 * sum(tensor.numel() for tensor in whole(resumed).values())


def test_a_checkpoint_has_the_merged_policy_and_an_adapter_for_peft(
    model_folder: Path, tmp_path: Path, trained: TrainingEngine
):
    from peft import PeftModel

    how: dict[str, Any] = {"base_path": model_folder, "dtype": torch.float32, "state": {}, "keep": 1}
    checkpoint = save_checkpoint(tmp_path, 2, trained, None, lora=LORA, **how)
    merged = load_file(checkpoint / "policy" / "model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in whole(trained).items())
    with_adapter = PeftModel.from_pretrained(plain_model(model_folder), checkpoint / "adapter")
    ids = INPUTS[0][None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(checkpoint / "policy")(ids).logits
        torch.testing.assert_close(with_adapter(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_run_publishes_adapters_agrees_with_its_actor_and_resumes(
    model_folder: Path, tmp_path: Path, socket_folder: Path
):
    run = ScriptedRun(tmp_path, socket_folder, model_folder, max_staleness=0)
    algorithm = GRPO(kl="loss", kl_coef=0.01, reference_refresh_every=1)
    lora = LoraConfig(rank=2, alpha=8)
    settings: dict[str, Any] = {"optimizer": OptimizerConfig(0.02)}
    try:
        actor = run.start_actor()
        trainer, manifests = run.learn(algorithm, 1, lora=lora, **settings)
        assert trainer.version == 1
        names = {entry.name.rsplit(".", 3)[1] for manifest in manifests for entry in manifest.tensors}
        assert names == {*("q_proj", "k_proj", "v_proj", "o_proj"), *("gate_proj", "up_proj", "down_proj")}
        with pytest.raises(CheckpointError, match=r"rank=2, which learner.lora.rank=3 cannot"):
            run.learn(algorithm, 2, lora=replace(lora, rank=3), **settings)
        # The run continues and publishes merged weights. Its first batch checks the actor's log-probabilities to 1e-4.
        trainer, manifests = run.learn(algorithm, 2, lora=replace(lora, publish="merged"), **settings)
        assert trainer.version == 2 and 1 in actor.loaded
        assert {entry.name for entry in manifests[-1].tensors} == set(
            dict(plain_model(model_folder).named_parameters())
        )
        reference = trainer.networks.reference
        assert reference is not None
        assert all(
            torch.equal(reference.get_parameter(name), tensor) for name, tensor in trainer.networks.policy.gathered()
        )
    finally:
        run.close()


def test_a_checkpoint_with_other_adapters_is_refused_with_the_way_out():
    check_same_adapters(Path("c"), LORA, replace(LORA, publish="merged"))
    check_same_adapters(Path("c"), LoraConfig(), LoraConfig())
    sentence = r"c was written with learner.lora.rank=2, which learner.lora.rank=4 cannot .* model.path=c/policy"
    with pytest.raises(CheckpointError, match=sentence):
        check_same_adapters(Path("c"), LORA, replace(LORA, rank=4))
    with pytest.raises(CheckpointError, match=r"alpha=6 and learner.lora.target_modules=.*lora.alpha=7 and"):
        check_same_adapters(Path("c"), LORA, replace(LORA, alpha=7, target_modules=[]))
    with pytest.raises(CheckpointError, match=r"which learner.lora.rank=0"):
        check_same_adapters(Path("c"), LORA, LoraConfig())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": -1}, ["rank=-1", "use 0 for none"]),
        ({"rank": 1.5}, ["learner.lora.rank", "1.5"]),
        ({"rank": 4, "alpha": 0}, ["alpha=0", "above 0"]),
        ({"rank": 4, "publish": "all"}, ["publish=all", "adapter, merged"]),
        ({"target_modules": ["q_proj"]}, ["rank=0", "set it"]),
        ({"base_4bit": True}, ["rank=0", "set it"]),
        ({"rank": 4, "dropout": 0.1}, ["learner.lora.dropout is not a known setting", "rank"]),
        ({"rank": 4, "base_4bit": True, "publish": "merged"}, ["base_4bit=true", "use adapter"]),
    ],
)
def test_every_mistake_is_one_sentence_with_the_way_out(changes: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError) as error:
        read_section(LearnerConfig, LEARNER | {"lora": changes}, "learner")
    sentence = str(error.value)
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("changes", [{"device": "cpu"}, {"device": "cuda", "zero_stage": 3}])
def test_four_bits_need_a_device_and_whole_layers(changes: dict[str, Any]):
    with pytest.raises(ValueError, match=r"base_4bit=true needs CUDA .* use cuda and stage 0 to 2"):
        read_section(LearnerConfig, LEARNER | {"lora": {"rank": 4, "base_4bit": True}, **changes}, "learner")
