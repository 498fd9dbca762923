"""The language-model head that scores given tokens: log-probabilities and entropies without [tokens x vocabulary].

Used by `learner/models/policy.py` in the place of a causal model's output layer, whose weights it shares. Logits exist
for a bounded number of tokens at a time and are computed again in the backward pass, unless all of them fit that
bound; one call gathers a sharded weight once for each direction. Sums over the vocabulary and the weight's gradient
are float32 (float64 for float64 parameters), but where a fused kernel does all of it on CUDA:
`learner/models/fused_head.py`.
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
"""Logits that exist at the same time: 134 MB in float32."""


class ScoringHead(nn.Linear):
    """An output layer [vocabulary, hidden_size] that returns scores of tokens and never logits."""

    @classmethod
    def of(cls, layer: nn.Linear) -> ScoringHead:
        """With the parameters of `layer` themselves, so that tied weights stay tied."""
        head = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        head.weight, head.bias = layer.weight, layer.bias
        return head

    def forward(self, hidden: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Under softmax(logits / temperature), of each row of `hidden`.

        Args:
            hidden: [M, hidden_size].
            tokens: [M] int64.
            temperature: above 0.

        Returns:
            log-probability of the token [M] and entropy of the distribution [M] in nats.
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
            # Or it would live on beside the next chunk's.
            del logs
        logprobs, entropies = (torch.cat(part) for part in zip(*parts, strict=True))
        # A parameter is referred to and not saved: under ZeRO-3 its storage comes and goes between the two passes.
        ctx.weight, ctx.bias, ctx.temperature = weight, bias, temperature
        ctx.save_for_backward(hidden, tokens, entropies, *kept)
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_logprobs: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, tokens, entropies, *kept = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        wide = entropies.dtype
        by_logprobs = torch.zeros_like(entropies) if by_logprobs is None else by_logprobs
        by_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        by_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        by_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None
        for start, stop in _cuts(len(hidden), weight.shape[0]):
            rows = slice(start, stop)
            logs = kept[0] if kept else _log_probabilities(hidden[rows], weight, bias, ctx.temperature)
            factor = by_logprobs[rows, None] / -ctx.temperature
            if by_entropy is not None:
                factor = (logs + entropies[rows, None]).mul_(by_entropy[rows, None] / -ctx.temperature).add_(factor)
            by_logits = logs.exp_().mul_(factor)
            by_logits.scatter_add_(-1, tokens[rows, None], by_logprobs[rows, None] / ctx.temperature)
            if by_bias is not None:
                by_bias += by_logits.sum(0)
            narrow = by_logits.to(weight.dtype)
            if by_hidden is not None:
                torch.mm(narrow, weight, out=by_hidden[rows])
            if by_weight is not None:
                _add_product(by_weight, narrow.T, hidden[rows])
            del logs, by_logits, narrow
        by_weight = None if by_weight is None else by_weight.to(weight.dtype)
        return by_hidden, by_weight, None if by_bias is None else by_bias.to(weight.dtype), None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left right to `total`, in the precision of `total`."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _log_probabilities(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[m, vocabulary] in float32 or float64."""
    logits = linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return log_softmax(logits.div_(temperature) if temperature != 1 else logits, dim=-1)


def _cuts(num_rows: int, vocabulary: int) -> list[tuple[int, int]]:
    """(start, stop) of runs of rows whose logits fit the bound."""
    rows = max(LOGITS_PER_CHUNK // vocabulary, 1)
    return list(pairwise([*range(0, num_rows, rows), num_rows])) or [(0, 0)]
