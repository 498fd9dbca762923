"""The language-model head that scores given tokens, without holding all [tokens x vocabulary] logits.

`learner/models/policy.py` puts it in the place of a causal model's output layer, with the same weights. Logits are
computed for a chunk of tokens at a time, and again in the backward pass unless one chunk holds all tokens. A sharded
weight is gathered once in the forward and once in the backward pass. Sums over the vocabulary and the weight's gradient
are float32 (float64 for float64 parameters). On CUDA a fused kernel may do all of this: `learner/models/fused_head.py`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, log_softmax

from learner.models.fused_head import fits, fused_scores

LOGITS_PER_CHUNK = 1 << 25
"""Logits held at the same time: 134 MB in float32."""


class ScoringHead(nn.Linear):
    """An output layer [vocabulary, hidden_size] that returns scores of given tokens instead of logits."""

    @classmethod
    def of(cls, layer: nn.Linear) -> ScoringHead:
        """Return a head that holds the parameters of `layer` themselves, so tied weights stay tied."""
        head = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        head.weight, head.bias = layer.weight, layer.bias
        return head

    def forward(self, hidden: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Score one token for each row of `hidden`, under softmax(logits / temperature).

        Args:
            hidden: [M, hidden_size].
            tokens: [M] int64.
            temperature: above 0.

        Returns:
            log-probabilities of the tokens [M] and entropies of the distributions [M] in nats.
        """
        if fits(hidden, self.weight, self.bias):
            return fused_scores(hidden, self.weight, tokens, temperature)
        scores: tuple[Tensor, Tensor] = _Scores.apply(  # type: ignore[no-untyped-call]
            hidden, self.weight, self.bias, tokens, temperature
        )
        return scores


class _Scores(torch.autograd.Function):
    """log p(token) and H(p) of p = softmax(z / T), z = hidden weight^T + bias.

    d log p_k / d z_j = (1[j = k] - p_j) / T and d H / d z_j = -p_j (log p_j + H) / T.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        parts, kept = [], []
        cuts = _cuts(len(hidden), weight.shape[0])
        keep = len(cuts) == 1 and any(ctx.needs_input_grad)
        for start, stop in cuts:
            logs = _log_probabilities(hidden[start:stop], weight, bias, temperature)
            entropy = -torch.linalg.vecdot(logs.exp(), logs)
            parts.append((logs.gather(-1, tokens[start:stop, None]).squeeze(-1), entropy))
            kept = [logs] if keep else []
            # Free this chunk before the next one is computed.
            del logs
        logprobs, entropies = (torch.cat(part) for part in zip(*parts, strict=True))
        # Keep references instead of saved tensors: ZeRO-3 frees the storage of parameters between the two passes.
        ctx.weight, ctx.bias, ctx.temperature = weight, bias, temperature
        ctx.save_for_backward(hidden, tokens, entropies, *kept)
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, tokens, entropies, *kept = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        wide = entropies.dtype
        grad_logprobs = torch.zeros_like(entropies) if grad_logprobs is None else grad_logprobs
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None
        for start, stop in _cuts(len(hidden), weight.shape[0]):
            rows = slice(start, stop)
            logs = kept[0] if kept else _log_probabilities(hidden[rows], weight, bias, ctx.temperature)
            factor = grad_logprobs[rows, None] / -ctx.temperature
            if grad_entropy is not None:
                factor = (logs + entropies[rows, None]).mul_(grad_entropy[rows, None] / -ctx.temperature).add_(factor)
            grad_logits = logs.exp_().mul_(factor)
            grad_logits.scatter_add_(-1, tokens[rows, None], grad_logprobs[rows, None] / ctx.temperature)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            narrow = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(narrow, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, narrow.T, hidden[rows])
            del logs, grad_logits, narrow
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(weight.dtype), None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the matrix product of `left` and `right` to `total`, in the precision of `total`."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _log_probabilities(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """Return the log-probabilities of all tokens of the vocabulary, [m, vocabulary] in float32 or float64."""
    logits = linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return log_softmax(logits.div_(temperature) if temperature != 1 else logits, dim=-1)


def _cuts(num_rows: int, vocabulary: int) -> list[tuple[int, int]]:
    """Return (start, stop) of chunks of rows with at most `LOGITS_PER_CHUNK` logits, or of one row."""
    rows = max(LOGITS_PER_CHUNK // vocabulary, 1)
    return list(pairwise([*range(0, num_rows, rows), num_rows])) or [(0, 0)]
