"""Liger-kernel's fused scaled cross-entropy, used instead of the chunked head where it is installed and can run.

The kernel returns log-probability and entropy of every token under a temperature, with a gradient per token. It differs
from the chunked head in rounding:
- Logits are rounded to float16 instead of bfloat16, which is finer.
- The entropy is rounded to bfloat16, also where its gradient uses it.
- The weight's gradient is summed in bfloat16 over waves of 1,024 tokens, instead of in float32.

Liger's reducing kernel and torch's `linear_cross_entropy` return no entropy, and torch's rounds bfloat16 losses.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

HOPPER = (9, 0)
HIDDEN_MULTIPLE = 64
"""The hidden size must be a multiple of this. Otherwise the kernel pads a copy of the weight, which a sharded weight
must not have."""


@cache
def is_installed() -> bool:
    """Return whether the library and the compiler of its Hopper kernel are installed.

    Without the compiler the library would use torch.
    """
    return find_spec("liger_kernel") is not None and find_spec("cutlass") is not None


def fits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the kernel supports these inputs: bfloat16 on a Hopper device, no bias."""
    return (
        hidden.is_cuda
        and hidden.dtype == weight.dtype == torch.bfloat16
        and bias is None
        and len(hidden) > 0
        and hidden.shape[1] % HIDDEN_MULTIPLE == 0
        and torch.cuda.get_device_capability(hidden.device) == HOPPER
        and is_installed()
    )


def fused_scores(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Score as `ScoringHead.forward` does: log-probabilities [M] and entropies [M], both float32."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    # -100 is the token id to ignore, which no vocabulary has; the 1 after it has no effect.
    arguments = (hidden, weight, tokens, temperature, -100, 1, True)
    negative, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(*arguments)
    return -negative, entropy.float()
