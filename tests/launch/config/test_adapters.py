"""Checks of LoRA against model, machine and other settings, before any process starts."""

from pathlib import Path
from typing import Any

import pytest

from launch.config import adapters
from launch.config.adapters import check_lora_layers, check_lora_settings, embedded_layers, folder_layers
from launch.config.settings import EmbeddedConfig
from learner.config import LoraConfig
from tests.learner.samples import save_tiny_model

SMALL = EmbeddedConfig(hidden_size=32, intermediate_size=48, num_heads=1)
LAYERS = embedded_layers(SMALL)
FOUR_BITS = LoraConfig(rank=8, base_4bit=True)


def assert_refused(caught: pytest.ExceptionInfo[ValueError], expected: list[str]) -> None:
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert [text for text in expected if text not in sentence] == [], sentence


def test_one_word_turns_adapters_on(make_plan: Any):
    assert make_plan("learner.lora.rank=8").sections["learner"]["lora"] == {"rank": 8}


def test_the_plan_is_refused_when_the_model_or_another_setting_does_not_suit(make_plan: Any):
    with pytest.raises(ValueError) as caught:
        make_plan("learner.lora.rank=65")
    assert_refused(caught, ["learner.lora.rank=65 is above 64", "self_attn.q_proj [64 x 64]", "at most 64"])
    with pytest.raises(ValueError) as caught:
        make_plan("learner.lora.rank=8", "actor.dtype=bfloat16")
    assert_refused(caught, ["actor.dtype=bfloat16", "model.dtype=float32", "learner.lora.publish=merged"])


@pytest.mark.parametrize("targets", [["q_proj", "qproj"], ["qproj"], ["proj"], ["lm_head"], ["embed_tokens"]])
def test_a_layer_that_is_not_there_is_named_with_those_that_are(targets: list[str]):
    with pytest.raises(ValueError) as caught:
        check_lora_layers(LoraConfig(rank=8, target_modules=targets), LAYERS)
    assert_refused(caught, [f"names {targets[-1]}, which is no linear layer", "it has down_proj, gate_proj, k_proj"])


def test_the_rank_is_compared_with_the_layers_that_train():
    wide = LAYERS | {"model.layers.0.mlp.up_proj": (100, 100)}
    check_lora_layers(LoraConfig(rank=32), wide)
    check_lora_layers(LoraConfig(rank=100, target_modules=["mlp.up_proj"]), wide)
    for targets in ([], ["up_proj", "down_proj"]):
        with pytest.raises(ValueError, match=r"rank=33 is above 32"):
            check_lora_layers(LoraConfig(rank=33, target_modules=targets), wide)


def test_types_must_agree_where_actors_merge():
    check_lora_settings(LoraConfig(rank=8, publish="merged"), model_dtype="float32", actor_dtype="bfloat16")
    check_lora_settings(LoraConfig(rank=8), model_dtype="bfloat16", actor_dtype="bfloat16")


@pytest.mark.parametrize("missing", ["model.dtype=bfloat16", "a CUDA device", "the package bitsandbytes"])
def test_four_bits_go_with_what_they_need(monkeypatch: pytest.MonkeyPatch, missing: str):
    def set_up(missing: str) -> str:
        monkeypatch.setattr(adapters, "has_cuda", lambda: missing != "a CUDA device")
        monkeypatch.setattr(adapters, "find_spec", lambda _: None if missing.startswith("the package") else object())
        return "float32" if missing.startswith("model") else "bfloat16"

    dtype = set_up("")
    check_lora_settings(FOUR_BITS, model_dtype=dtype, actor_dtype=dtype)
    dtype = set_up(missing)
    with pytest.raises(ValueError) as caught:
        check_lora_settings(FOUR_BITS, model_dtype=dtype, actor_dtype=dtype)
    assert_refused(caught, [f"base_4bit=true needs {missing}", "leave it out"])
    assert " and " not in str(caught.value)


def test_the_layers_of_a_folder_are_read_from_its_headers(tmp_path: Path):
    assert folder_layers(save_tiny_model(tmp_path, heads=1, layers=1)) == LAYERS


@pytest.mark.parametrize("contents", [None, b"", b"\xff" * 20, b"\x02" + bytes(7) + b"{]"])
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, contents: bytes | None):
    (tmp_path / "pytorch_model.bin").touch()
    if contents is not None:
        (tmp_path / "model.safetensors").write_bytes(contents)
    with pytest.raises(ValueError) as caught:
        folder_layers(tmp_path)
    assert_refused(caught, [f"model.path={tmp_path}"])
