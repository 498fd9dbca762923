"""Liger-kernel's fused scaled cross-entropy in the place of the chunked head, where it is installed and can run.

It alone of what was looked at gives per-token log-probabilities and entropies under a temperature with a gradient per
token. Compared with the chunked head: logits are rounded to float16 instead of bfloat16, which is finer; the entropy is
rounded to bfloat16, also where its gradient uses it; the weight's gradient is summed in bfloat16 over waves of 1,024
tokens instead of in float32. Liger's reducing kernel and torch's `linear_cross_entropy` have no entropy, and torch's
rounds bfloat16 losses.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

HOPPER = (9, 0)
HIDDEN_MULTIPLE = 64
"""Hidden sizes that the kernel takes without a padded copy of the weight, which a sharded weight must not have."""


@cache
def is_installed() -> bool:
    """Whether the library and the compiler of its Hopper kernel are there; without that it falls back to torch."""
    return find_spec("liger_kernel") is not None and find_spec("cutlass") is not None


def fits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel can score these: bfloat16 on a Hopper device, no bias."""
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
    """As `ScoringHead.forward`: log-probabilities [M] and entropies [M], both float32."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    # The arguments between are the token that is passed over, which no vocabulary has, and one that changes nothing.
    arguments = (hidden, weight, tokens, temperature, -100, 1, True)
    negative, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(*arguments)
    return -negative, entropy.float()
