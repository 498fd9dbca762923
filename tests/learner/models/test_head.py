import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import learner.models.fused_head
import learner.models.head
from learner.models.head import ScoringHead

TOKENS, HIDDEN, VOCABULARY, TEMPERATURE = 23, 8, 19, 0.7


def naive(layer: nn.Linear, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    logs = (layer(hidden) / TEMPERATURE).log_softmax(-1)
    return logs.gather(-1, tokens[:, None]).squeeze(-1), -(logs.exp() * logs).sum(-1)


@pytest.fixture(params=[5, TOKENS, 1000])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens whose logits fit: several chunks and a short one, exactly one chunk, less than one."""
    monkeypatch.setattr(learner.models.head, "LOGITS_PER_CHUNK", request.param * VOCABULARY)
    return request.param


def given_layer(dtype: torch.dtype, bias: bool) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(HIDDEN, VOCABULARY, bias=bias).to(dtype)
    return layer, torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True), torch.randint(VOCABULARY, (TOKENS,))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("by_entropy", [0.0, 0.3])
def test_scores_and_gradients_are_those_of_the_whole_matrix(rows: int, bias: bool, by_entropy: float):
    layer, hidden, tokens = given_layer(torch.float64, bias)
    leaves = [hidden, *layer.parameters()]
    found, slopes = [], []
    for scores in (ScoringHead.of(layer)(hidden, tokens, TEMPERATURE), naive(layer, hidden, tokens)):
        # Every token has another weight, so that the test notices swapped tokens.
        total = (scores[0] * torch.linspace(-1, 2, TOKENS)).sum()
        if by_entropy:
            total = total + by_entropy * (scores[1] * torch.linspace(2, 1, TOKENS)).sum()
        found.append(scores)
        slopes.append(torch.autograd.grad(total, leaves))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-12, atol=1e-12)


def test_a_gradient_of_the_entropy_alone(rows: int):
    layer, hidden, tokens = given_layer(torch.float64, False)
    slopes = [
        torch.autograd.grad(scores[1].sum(), [hidden, layer.weight])
        for scores in (ScoringHead.of(layer)(hidden, tokens, TEMPERATURE), naive(layer, hidden, tokens))
    ]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-12, atol=1e-12)


def test_half_precision_is_summed_in_float32(rows: int):
    layer, hidden, tokens = given_layer(torch.bfloat16, False)
    logprobs, entropy = ScoringHead.of(layer)(hidden, tokens, TEMPERATURE)
    assert logprobs.dtype == entropy.dtype == torch.float32
    # Computed in float64 from the same rounded logits.
    exact = (layer(hidden).double() / TEMPERATURE).log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), exact.gather(-1, tokens[:, None]).squeeze(-1), rtol=1e-5, atol=1e-5)
    slopes = torch.autograd.grad(logprobs.sum(), [hidden, layer.weight])
    assert [slope.dtype for slope in slopes] == [torch.bfloat16] * 2


def test_a_frozen_weight_gets_no_gradient_and_shares_the_layers_parameters(rows: int):
    layer, hidden, tokens = given_layer(torch.float32, True)
    layer.requires_grad_(False)
    head = ScoringHead.of(layer)
    assert head.weight is layer.weight and head.bias is layer.bias
    head(hidden, tokens, TEMPERATURE)[0].sum().backward()
    assert layer.weight.grad is None and hidden.grad is not None


def test_logits_exist_for_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """No tensor of a forward and backward pass is larger than a chunk or the parameters."""
    monkeypatch.setattr(learner.models.head, "LOGITS_PER_CHUNK", 5 * VOCABULARY)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    layer, hidden, tokens = given_layer(torch.float32, False)
    with Watch():
        ScoringHead.of(layer)(hidden, tokens, TEMPERATURE)[0].sum().backward()
    assert largest == max(HIDDEN * VOCABULARY, TOKENS * HIDDEN, 5 * VOCABULARY) < TOKENS * VOCABULARY


def test_a_fused_kernel_scores_where_it_fits_and_nowhere_else(monkeypatch: pytest.MonkeyPatch):
    layer, hidden, tokens = given_layer(torch.float32, False)
    chunked = ScoringHead.of(layer)(hidden, tokens, TEMPERATURE)
    asked = []

    def kernel(*given: object) -> tuple[Tensor, Tensor]:
        """Liger's contract: negative log-probabilities, and entropies in the inputs' type."""
        hidden, weight, tokens, temperature, passed_over, _, with_entropy = given
        assert (weight is layer.weight, passed_over, with_entropy) == (True, -100, True)
        asked.append(temperature)
        logprobs, entropy = naive(layer, hidden, tokens)
        return -logprobs, entropy.bfloat16()

    library = SimpleNamespace(LigerFusedLinearScaledCrossEntropyFunction=SimpleNamespace(apply=kernel))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", library)
    monkeypatch.setattr(learner.models.fused_head, "is_installed", lambda: True)
    # On a CPU the kernel is not used, even if it is installed.
    ScoringHead.of(layer)(hidden, tokens, TEMPERATURE)
    assert asked == []
    monkeypatch.setattr(learner.models.head, "fits", lambda *_: True)
    fused = ScoringHead.of(layer)(hidden, tokens, TEMPERATURE)
    assert asked == [TEMPERATURE]
    torch.testing.assert_close(fused[0], chunked[0])
    torch.testing.assert_close(fused[1], chunked[1], rtol=2**-8, atol=0)
