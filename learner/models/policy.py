"""The networks that the learner trains: a Hugging Face decoder over packed sequences, with a policy or value head.

Sequences are concatenated on one axis without padding. Position ids restart with every sequence, and attention stays
within each sequence (`learner/models/attention.py`). A shared prefix, such as a group's prompt, is computed once and
repeated only for attention. The head scores only the scored tokens, and their [tokens x vocabulary] logits are never
all in memory. On a CPU `learner/models/cpu_layers.py` replaces layers of transformers by faster ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from learner.batches.prefix_sharing import SharedPrefixes
from learner.config import LoraConfig
from learner.models.attention import register_packed_attention
from learner.models.cpu_layers import patch_for_cpu
from learner.models.head import ScoringHead
from learner.models.lora import add_adapters, four_bit_base


class ScoredDecoder(nn.Module):
    """A decoder over packed sequences, with a head that scores tokens."""

    attention_crossover_tokens: float
    """Sequence length at which attention costs as many operations as the linear layers."""

    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        boundaries: Sequence[int],
        targets: Tensor,
        shared: SharedPrefixes | None = None,
    ) -> Any:
        """Return the head's outputs for the scored tokens; `_outputs` of the subclass says which.

        Args:
            token_ids: [N] int64 packed sequences.
            position_ids: [N] int64, restarting at 0 with every sequence.
            boundaries: [num_sequences + 1] start offset of each sequence, then N.
            targets: [M] int64 indices into N of the scored tokens; never the first of a sequence.
            shared: prefixes that are computed once; None: every token is computed.
        """
        predecessors = targets - 1
        computed, positions = token_ids, position_ids
        if shared is not None:
            computed, positions = token_ids[shared.computed], position_ids[shared.computed]
            predecessors = shared.source[predecessors]
        output = self._decoder()(
            input_ids=computed.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            boundaries=tuple(boundaries),
            shared=shared,
        )
        # Faster than indexing with `[]`, whose backward pass sorts the rows in case they repeat.
        states = output.last_hidden_state[0].index_select(0, predecessors)
        return self._outputs(states, token_ids[targets])

    def _decoder(self) -> nn.Module:
        raise NotImplementedError

    def _outputs(self, states: Tensor, scored: Tensor) -> Any:
        """Return the outputs for [M, hidden_size] states and the [M] int64 tokens sampled from them."""
        raise NotImplementedError


class PolicyModel(ScoredDecoder):
    """A causal language model that scores given tokens under the sampling temperature."""

    def __init__(self, causal_lm: PreTrainedModel, temperature: float) -> None:
        super().__init__()
        causal_lm.set_output_embeddings(ScoringHead.of(causal_lm.get_output_embeddings()))
        patch_for_cpu(causal_lm)
        self.causal_lm = causal_lm
        self.temperature = temperature
        self.attention_crossover_tokens = _attention_crossover_tokens(causal_lm.get_decoder())

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype,
        temperature: float,
        checkpointing: bool,
        lora: LoraConfig | None = None,
    ) -> PolicyModel:
        """Load the policy from the Hugging Face folder `path`; `temperature` is the actors' sampling temperature."""
        lora = lora or LoraConfig()
        policy = cls(_load(AutoModelForCausalLM, path, dtype, checkpointing, base_4bit=lora.base_4bit), temperature)
        if lora.rank:
            add_adapters(policy.causal_lm, lora)
        return policy

    def _decoder(self) -> nn.Module:
        decoder: nn.Module = self.causal_lm.get_decoder()
        return decoder

    def _outputs(self, states: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of the scored tokens, and entropies of the distributions they were sampled from.

        Returns:
            logprobs [M] float32 and entropy [M] float32 in nats.
        """
        scores: tuple[Tensor, Tensor] = self.causal_lm.get_output_embeddings()(states, scored, self.temperature)
        return scores


class ValueModel(ScoredDecoder):
    """A decoder with a new scalar head: V(s_t) at the state that each scored token was sampled from."""

    def __init__(self, decoder: nn.Module, hidden_size: int) -> None:
        super().__init__()
        patch_for_cpu(decoder)
        self.decoder = decoder
        self.attention_crossover_tokens = _attention_crossover_tokens(decoder)
        self.value_head = nn.Linear(hidden_size, 1)
        # Values start at 0, so the first advantages equal the returns. A random head would add noise.
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    @classmethod
    def load(cls, path: str | Path, *, dtype: torch.dtype, checkpointing: bool) -> ValueModel:
        """Load a critic whose decoder starts from the policy's folder `path`."""
        decoder = _load(AutoModel, path, dtype, checkpointing)
        return cls(decoder, decoder.config.hidden_size).to(dtype)

    def _decoder(self) -> nn.Module:
        return self.decoder

    def _outputs(self, states: Tensor, scored: Tensor) -> Tensor:
        """Return values [M] float32 of the states before the scored tokens."""
        values: Tensor = self.value_head(states).squeeze(-1)
        return values.float()


def _load(kind: Any, path: str | Path, dtype: torch.dtype, checkpointing: bool, *, base_4bit: bool = False) -> Any:
    quantized = (
        {"quantization_config": four_bit_base(), "device_map": {"": torch.cuda.current_device()}} if base_4bit else {}
    )
    network = kind.from_pretrained(path, dtype=dtype, attn_implementation=register_packed_attention(), **quantized)
    network.config.use_cache = False
    if checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers loads models in evaluation mode, in which it keeps all activations instead of recomputing them.
        network.train()
    return network


def _attention_crossover_tokens(decoder: Any) -> float:
    """Compute the sequence length at which attention costs as many operations as the linear layers.

    Operations per token and layer: 2 for each parameter, against 4 x hidden_size x length for scores and weighted
    values, halved by the causal mask.
    """
    embedding = decoder.get_input_embeddings().weight
    parameters = sum(parameter.numel() for parameter in decoder.parameters() if parameter is not embedding)
    return float(parameters / (decoder.config.num_hidden_layers * decoder.config.hidden_size))
