from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

import learner.models.head
from learner.batches.batch import MicroBatch
from learner.models.policy import PolicyModel, ValueModel
from tests.learner.samples import VOCABULARY, make_batch, make_group, plain_model, plain_scores, save_tiny_model

SHAPES = {
    "one_head_tied": {"heads": 1, "key_value_heads": 1, "tied": True},
    "grouped_queries_tied": {"heads": 4, "key_value_heads": 2, "tied": True},
    "grouped_queries_untied": {"heads": 2, "key_value_heads": 1, "tied": False},
}


@pytest.fixture(scope="module", params=list(SHAPES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), **SHAPES[request.param])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch):
    # The scored tokens do not divide into chunks of seven, so the last one is short.
    monkeypatch.setattr(learner.models.head, "LOGITS_PER_CHUNK", 7 * VOCABULARY)


def packed() -> MicroBatch:
    """Three sequences of different lengths, one with unscored tokens in the middle."""
    (micro,) = make_batch([make_group("g", 0, size=3)]).microbatches(range(0, 3), 1000)
    assert len(micro.targets) % 7 and len(micro.targets) > 14
    return micro


def sequences(micro: MicroBatch) -> list[tuple[Tensor, Tensor]]:
    """(token ids, scored positions) of each sequence by itself."""
    pairs = []
    for start, stop in zip(micro.boundaries, micro.boundaries[1:], strict=False):
        inside = micro.targets[(micro.targets >= start) & (micro.targets < stop)]
        pairs.append((micro.token_ids[start:stop], inside - start))
    return pairs


def one_by_one(folder: Path, micro: MicroBatch, temperature: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probabilities, entropies, and the gradients of their sum weighted 1 and 0.3."""
    model = plain_model(folder)
    parts = [(plain_scores(model, ids, temperature), scored) for ids, scored in sequences(micro)]
    logprobs = torch.cat([scores[0][scored - 1] for scores, scored in parts])
    entropy = torch.cat([scores[1][scored - 1] for scores, scored in parts])
    (logprobs.sum() + 0.3 * entropy.sum()).backward()
    return logprobs.detach(), entropy.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("checkpointing", "shared"), [(False, True), (True, True), (False, False)])
def test_packed_scores_and_gradients_equal_one_sequence_at_a_time(
    folder: Path, temperature: float, checkpointing: bool, shared: bool
):
    micro = packed()
    assert micro.shared is not None and len(micro.shared.computed) == len(micro.token_ids) - 6 - 3
    micro = micro if shared else replace(micro, shared=None)
    policy = PolicyModel.load(folder, dtype=torch.float32, temperature=temperature, checkpointing=checkpointing)
    logprobs, entropy = policy(*micro.inputs)
    expected_logprobs, expected_entropy, expected = one_by_one(folder, micro, temperature)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    (logprobs.sum() + 0.3 * entropy.sum()).backward()
    gradients = {n: p.grad for n, p in policy.causal_lm.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = float(expected[name].abs().max()) + 1.0
        torch.testing.assert_close(gradient / scale, expected[name] / scale, rtol=0, atol=1e-5, msg=name)


def test_a_sequence_does_not_see_its_neighbors(folder: Path):
    micro = replace(packed(), shared=None)
    policy = PolicyModel.load(folder, dtype=torch.float32, temperature=1.0, checkpointing=False)
    before, _ = policy(*micro.inputs)
    changed = micro.token_ids.clone()
    changed[: micro.boundaries[1]] = changed[: micro.boundaries[1]].flip(0)
    after, _ = policy(changed, micro.position_ids, micro.boundaries, micro.targets)
    first = int((micro.targets < micro.boundaries[1]).sum())
    assert not torch.allclose(before[:first], after[:first], atol=1e-3)
    torch.testing.assert_close(before[first:], after[first:])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_runs_each_layer_again_in_the_backward_pass(folder: Path, checkpointing: bool):
    policy = PolicyModel.load(folder, dtype=torch.float32, temperature=1.0, checkpointing=checkpointing)
    calls = []
    policy.causal_lm.get_decoder().layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    policy(*packed().inputs)[0].sum().backward()
    assert len(calls) == (2 if checkpointing else 1)


def test_values_are_zero_at_first_and_then_those_of_the_state_before_each_token(folder: Path):
    micro = packed()
    critic = ValueModel.load(folder, dtype=torch.float64, checkpointing=False)
    assert critic(*micro.inputs).abs().max() == 0
    torch.nn.init.normal_(critic.value_head.weight)
    critic.value_head.bias.data.fill_(0.5)
    decoder = AutoModel.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    states = [decoder(ids.unsqueeze(0)).last_hidden_state[0][scored - 1] for ids, scored in sequences(micro)]
    expected = torch.cat(states) @ critic.value_head.weight[0] + 0.5
    torch.testing.assert_close(critic(*micro.inputs), expected.float(), rtol=1e-5, atol=1e-5)


def test_outputs_are_float32_whatever_the_parameters_are(model_folder: Path):
    micro = packed()
    policy = PolicyModel.load(model_folder, dtype=torch.bfloat16, temperature=1.0, checkpointing=False)
    critic = ValueModel.load(model_folder, dtype=torch.bfloat16, checkpointing=False)
    assert {p.dtype for p in (*policy.parameters(), *critic.parameters())} == {torch.bfloat16}
    logprobs, entropy = policy(*micro.inputs)
    assert logprobs.dtype == entropy.dtype == critic(*micro.inputs).dtype == torch.float32
    assert float(logprobs.detach().max()) <= 0.0
