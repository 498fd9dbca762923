"""The fused kernels compute the same as vLLM's torch operations, and are not used for unsupported inputs."""

import pytest
import torch
from torch.nn.functional import silu
from vllm import ir

from actors.engine.cpu_kernels import PROVIDER, FusedSiluAndMul, use_fused_kernels

ROWS, EPSILON = 5, 1e-6


@pytest.fixture(autouse=True)
def _registered() -> None:
    told = use_fused_kernels()
    # A second call in the same process, as for a second engine.
    assert use_fused_kernels() == told


def rows(width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-6 if found.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 128, 100])
def test_norms_are_those_of_the_formula(width: int, dtype: torch.dtype) -> None:
    x, residual, weight = (rows(width, dtype, seed) for seed in (1, 2, 3))
    weight = weight[0].contiguous()
    for op, inputs in ((ir.ops.rms_norm, (x,)), (ir.ops.fused_add_rms_norm, (x, residual))):
        native, fused = op.impls["native"], op.impls[PROVIDER]
        assert fused.supports_args(*inputs, weight, EPSILON) is (width % 16 == 0)
        if width % 16:
            continue
        expected = native.impl_fn(*(tensor.clone() for tensor in inputs), weight, EPSILON)
        found = fused.impl_fn(*(tensor.clone() for tensor in inputs), weight, EPSILON)
        for one, other in zip(*(out if isinstance(out, tuple) else (out,) for out in (found, expected)), strict=True):
            close(one, other)


def test_a_norm_over_a_part_or_of_another_layout_is_left_to_torch() -> None:
    x, weight = rows(32, torch.float32, 1), torch.ones(16)
    supports = ir.ops.rms_norm.impls[PROVIDER].supports_args
    assert supports(x[:, :16].contiguous(), weight, EPSILON)
    assert not supports(x[:, :16], weight, EPSILON)
    assert not supports(x, torch.ones(32), EPSILON, 16)
    assert not supports(x, None, EPSILON)
    assert not supports(x, torch.ones(32, dtype=torch.bfloat16), EPSILON)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 340])
def test_swiglu_is_that_of_the_formula(width: int, dtype: torch.dtype) -> None:
    x = rows(2 * width, dtype, 4)
    before = x.clone()
    found = FusedSiluAndMul.forward_cpu(None, x)  # type: ignore[arg-type]
    close(found, silu(x[:, :width]) * x[:, width:])
    assert torch.equal(x, before)
