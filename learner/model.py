"""The networks the learner trains: a Hugging Face decoder over packed sequences, with a language-model or a value head.

Sequences are concatenated to one axis and no padding is computed: position ids restart with every sequence, and an
attention function registered with transformers keeps attention inside each one. The [tokens x vocabulary] matrix is
never held whole: log-probabilities and entropy are computed in chunks that are recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM, PreTrainedModel

PACKED_ATTENTION = "slipstream_packed"
TOKENS_PER_CHUNK = 1024
"""Scored tokens whose logits exist at the same time."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    boundaries: Sequence[int] = (),
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each of the packed sequences.

    Args:
        module: the attention layer; unused, part of transformers' signature.
        query: [1, heads, N, head_dim]; `key` and `value` may have fewer heads (grouped queries).
        key: [1, key_value_heads, N, head_dim].
        value: [1, key_value_heads, N, head_dim].
        attention_mask: must be None; the boundaries are the mask.
        scaling: factor on the scores, 1 / sqrt(head_dim) when None.
        boundaries: [num_sequences + 1] start offsets and N.

    Returns:
        [1, N, heads, head_dim] and no attention weights.
    """
    grouped = query.shape[1] != key.shape[1]
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen_attention(query, key, value, scaling, boundaries, grouped), None
    outputs = [
        scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            is_causal=True,
            scale=scaling,
            enable_gqa=grouped,
        )
        for start, end in pairwise(boundaries)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, boundaries: Sequence[int], grouped: bool
) -> Tensor:
    """The same through one variable-length flash kernel; CUDA in half precision only."""
    from torch.nn.attention.varlen import varlen_attn

    offsets = torch.tensor(boundaries, dtype=torch.int32, device=query.device)
    longest = max(end - start for start, end in pairwise(boundaries))
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        offsets,
        offsets,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=grouped,
    )
    assert isinstance(output, Tensor)
    return output.unsqueeze(0)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


class PolicyModel(nn.Module):
    """A causal language model that scores given tokens under the sampling temperature."""

    def __init__(self, causal_lm: PreTrainedModel, temperature: float) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.temperature = temperature

    @classmethod
    def load(cls, path: str | Path, *, dtype: torch.dtype, temperature: float, checkpointing: bool) -> PolicyModel:
        """The Hugging Face folder `path` as a policy; `temperature` is the one the actors sample at."""
        return cls(_load(AutoModelForCausalLM, path, dtype, checkpointing), temperature)

    def forward(
        self, token_ids: Tensor, position_ids: Tensor, boundaries: Sequence[int], targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the scored tokens, and the entropy of the distributions they were drawn from.

        Args:
            token_ids: [N] int64 packed sequences.
            position_ids: [N] int64, restarting at 0 with every sequence.
            boundaries: [num_sequences + 1] start offsets and N.
            targets: [M] int64 indices into N of the tokens to score; never the first of a sequence.

        Returns:
            logprobs [M] float32 and entropy [M] float32 in nats.
        """
        hidden = _hidden_states(self.causal_lm.get_decoder(), token_ids, position_ids, boundaries)
        predicting, scored = hidden[targets - 1], token_ids[targets]
        chunks = zip(torch.split(predicting, TOKENS_PER_CHUNK), torch.split(scored, TOKENS_PER_CHUNK), strict=True)
        parts = [checkpoint(self._score, states, tokens, use_reentrant=False) for states, tokens in chunks]
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _score(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.causal_lm.get_output_embeddings()(hidden).float() / self.temperature
        log_normalizer = logits.logsumexp(dim=-1)
        logprobs = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - log_normalizer
        # H = log Z - E[logit]; equal to -sum p log p without a second [M x vocabulary] tensor of log-probabilities.
        entropy = log_normalizer - (logits.softmax(dim=-1) * logits).sum(dim=-1)
        return logprobs, entropy


class ValueModel(nn.Module):
    """A decoder with a fresh scalar head: V(s_t) at the state each scored token was sampled from."""

    def __init__(self, decoder: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.value_head = nn.Linear(hidden_size, 1)
        # Zero values at the start: the first advantages are then the returns, not the noise of a random head.
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    @classmethod
    def load(cls, path: str | Path, *, dtype: torch.dtype, checkpointing: bool) -> ValueModel:
        """A critic whose decoder starts from the policy's folder `path`."""
        decoder = _load(AutoModel, path, dtype, checkpointing)
        return cls(decoder, decoder.config.hidden_size).to(dtype)

    def forward(self, token_ids: Tensor, position_ids: Tensor, boundaries: Sequence[int], targets: Tensor) -> Tensor:
        """Values [M] float32 of the states before the scored tokens; arguments as in `PolicyModel.forward`."""
        hidden = _hidden_states(self.decoder, token_ids, position_ids, boundaries)
        values: Tensor = self.value_head(hidden[targets - 1]).squeeze(-1)
        return values.float()


def _load(kind: Any, path: str | Path, dtype: torch.dtype, checkpointing: bool) -> Any:
    network = kind.from_pretrained(path, dtype=dtype, attn_implementation=PACKED_ATTENTION)
    network.config.use_cache = False
    if checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers loads in evaluation mode, where it recomputes nothing and keeps every activation.
        network.train()
    return network


def _hidden_states(decoder: nn.Module, token_ids: Tensor, position_ids: Tensor, boundaries: Sequence[int]) -> Tensor:
    output = decoder(
        input_ids=token_ids.unsqueeze(0),
        position_ids=position_ids.unsqueeze(0),
        use_cache=False,
        boundaries=tuple(boundaries),
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden
