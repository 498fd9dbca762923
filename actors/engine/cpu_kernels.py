"""Makes vLLM use its own fused C++ kernels for RMSNorm and SwiGLU on a CPU.

vLLM itself runs several torch operations there and relies on torch's compiler to fuse them, but an actor on a CPU runs
without the compiler. `actors/engine/engine.py` calls `use_fused_kernels` before it creates an engine in this process.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu
from vllm import ir
from vllm.config.kernel import IrOpPriorityConfig
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.platforms import current_platform

PROVIDER = "slipstream_cpu"
KERNELS = ("rms_norm", "fused_add_rms_norm", "silu_and_mul")
ELEMENTS = 16
"""The kernels need a row length that is a multiple of this number of elements."""


def _norm_is_plain(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    fits = weight is not None and weight.dtype == x.dtype and x.shape[-1] % ELEMENTS == 0
    return fits and variance_size is None and x.is_contiguous()


def _sum_norm_is_plain(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _norm_is_plain(x, weight, epsilon, variance_size) and x_residual.is_contiguous()


def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    output = torch.empty_like(x)
    torch.ops._C.rms_norm(output, x, weight, epsilon)
    return output


def _fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


class FusedSiluAndMul(SiluAndMul):
    """silu(x[..., :d]) * x[..., d:] in one pass."""

    def forward_cpu(self, x: Tensor) -> Tensor:
        """Map x [..., 2 d] to [..., d]."""
        d = x.shape[-1] // 2
        if d % ELEMENTS:
            return silu(x[..., :d]).mul_(x[..., d:])
        output = x.new_empty((*x.shape[:-1], d))
        torch.ops._C.silu_and_mul(output, x)
        return output


def use_fused_kernels() -> IrOpPriorityConfig:
    """Register the kernels, once per process. Returns the engine argument that prefers them where they apply."""
    current_platform.import_kernels()
    if not all(hasattr(torch.ops._C, name) for name in KERNELS):
        # This build of vLLM, for another processor, has no such kernels.
        return IrOpPriorityConfig()
    if PROVIDER not in ir.ops.rms_norm.impls:
        ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_norm_is_plain)(_rms_norm)
        ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_sum_norm_is_plain, inplace=True)(
            _fused_add_rms_norm
        )
        SiluAndMul.register_oot(FusedSiluAndMul)
    return IrOpPriorityConfig(rms_norm=[PROVIDER], fused_add_rms_norm=[PROVIDER])
