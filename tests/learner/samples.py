"""Tiny models, synthetic groups, and reference log-probabilities: by transformers, one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from buffer.trajectory import FinishReason, Trajectory, TrajectoryGroup, VersionSpan
from learner.batches.batch import TrainingBatch
from learner.sft import END, PAD, character_tokenizer

CPU = torch.device("cpu")
ALPHABET = "0123456789+="
VOCABULARY = len(ALPHABET) + 3


def save_tiny_model(
    folder: Path, *, heads: int = 1, key_value_heads: int = 1, tied: bool = True, layers: int = 2, seed: int = 0
) -> Path:
    """Random weights, large enough for distributions far from uniform, and the character tokenizer of `ALPHABET`."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    backend = character_tokenizer(ALPHABET)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PAD).save_pretrained(folder)
    return folder


def plain_model(folder: Path) -> Qwen2ForCausalLM:
    """The folder's model with transformers' own attention, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def plain_scores(model: Qwen2ForCausalLM, token_ids: Sequence[int], temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies), [T - 1] each, of the tokens after the first; carries gradients."""
    tokens = torch.as_tensor(np.asarray(token_ids, dtype=np.int64))
    logprobs = (model(tokens.unsqueeze(0)).logits[0, :-1] / temperature).log_softmax(-1)
    return logprobs.gather(-1, tokens[1:, None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def make_trajectory(
    number: int,
    token_ids: Sequence[int],
    mask: Sequence[bool],
    *,
    group: str = "g",
    prompt_id: int = 0,
    reward: float = 0.0,
    verdict: str = "wrong",
    versions: Sequence[tuple[int, int]] = ((0, 0),),
    logprobs: Sequence[float] | None = None,
) -> Trajectory:
    """`logprobs` [T] are read where `mask` is True; the default is -1, -2, ... divided by 8."""
    scored = np.array(mask, dtype=np.bool_)
    behavior = -np.arange(1, len(token_ids) + 1) / 8 if logprobs is None else np.asarray(logprobs)
    return Trajectory(
        trajectory_id=f"{group}.{number}",
        group_id=group,
        prompt_id=prompt_id,
        token_ids=np.array(token_ids, dtype=np.int32),
        loss_mask=scored,
        behavior_logprobs=np.where(scored, np.minimum(behavior, 0.0), 0.0).astype(np.float32),
        policy_versions=tuple(VersionSpan(*run) for run in versions),
        reward=reward,
        reward_breakdown={"answer": reward},
        verdict=verdict,
        finish_reason=FinishReason.STOP,
        actor_id="actor-0",
    )


def make_group(
    name: str,
    prompt_id: int,
    *,
    size: int = 4,
    longest: int = 20,
    seed: int = 0,
    model: Qwen2ForCausalLM | None = None,
    temperature: float = 1.0,
    version: int = 0,
    shift: float = 0.0,
) -> TrajectoryGroup:
    """Random tokens after a prompt of three; the first trajectory has an observation in the middle.

    `model` gives the behavior log-probabilities, lowered by `shift`; without one they are made up.
    """
    rng = np.random.default_rng([seed, prompt_id])
    prompt = rng.integers(3, VOCABULARY, 3)
    members = []
    for number in range(size):
        length = int(rng.integers(6, longest + 1))
        tokens = np.concatenate([prompt, rng.integers(3, VOCABULARY, length - 3)])
        mask = np.arange(length) >= 3
        if number == 0:
            mask[4] = False
        logprobs = -rng.exponential(1.0, length)
        if model is not None:
            with torch.no_grad():
                logprobs[1:] = plain_scores(model, tokens, temperature)[0].numpy() - shift
        members.append(
            make_trajectory(
                number,
                tokens,
                mask,
                group=name,
                prompt_id=prompt_id,
                reward=float(rng.integers(0, 2) if number else prompt_id % 2),
                versions=((0, version),),
                logprobs=logprobs,
            )
        )
    return TrajectoryGroup(name, prompt_id, tuple(members))


def make_batch(groups: Sequence[TrajectoryGroup], policy_version: int = 0) -> TrainingBatch:
    """The groups as one rank's batch on the CPU."""
    staleness = [policy_version - group.oldest_version for group in groups]
    return TrainingBatch.from_groups(groups, staleness, policy_version, CPU)
