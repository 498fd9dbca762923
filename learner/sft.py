"""Supervised training of a small model on prompt and completion pairs. The launcher makes its embedded models with it.

`python -m learner.sft SETTINGS.json` builds a tokenizer and a Qwen2-architecture model with random weights, trains the
model on the completions, and writes a Hugging Face folder that is either complete or absent. It prints its progress to
standard output, one JSON object per line.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from learner.models.attention import register_packed_attention
from learner.models.policy import PolicyModel
from learner.schedule import learning_rate

PAD, END = "<|endoftext|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, END, "<|im_start|>")
"""The special tokens of the Qwen family, so that its chat template works unchanged."""


@dataclass(frozen=True)
class SftSettings:
    """What to build and how long to train it."""

    pairs: str
    """JSON lines with `prompt` and `completion`."""
    output: str
    """The model's folder; it appears when training is done."""
    alphabet: str = ""
    """Characters of the character tokenizer; empty: train a byte-level BPE on the pairs instead."""
    vocabulary: int = 4096
    """Size of the BPE vocabulary."""
    hidden_size: int = 96
    num_layers: int = 3
    num_heads: int = 3
    intermediate_size: int = 256
    max_tokens: int = 256
    """Context length, in tokens; longer pairs are left out."""
    steps: int = 1000
    """Optimizer steps; 0 leaves the weights random."""
    batch_size: int = 64
    learning_rate: float = 3e-3
    seed: int = 0


def character_tokenizer(alphabet: str) -> Tokenizer:
    """Make a tokenizer with one token per character; an unknown character becomes the padding token."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *sorted(set(alphabet))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def bpe_tokenizer(texts: Iterator[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE on `texts`; it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train(settings: SftSettings) -> None:
    """Build, train and save the model; print progress."""
    torch.manual_seed(settings.seed)
    pairs = [json.loads(line) for line in Path(settings.pairs).read_text(encoding="utf-8").splitlines()]
    if settings.alphabet:
        backend = character_tokenizer(settings.alphabet)
    else:
        backend = bpe_tokenizer((pair["prompt"] + pair["completion"] for pair in pairs), settings.vocabulary)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PAD)
    policy = PolicyModel(_build(settings, tokenizer), temperature=1.0)
    if settings.steps:
        _fit(policy, _encode(pairs, tokenizer, settings.max_tokens), settings)
    output, partial = Path(settings.output), Path(settings.output + ".incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    policy.causal_lm.config._attn_implementation = "sdpa"
    policy.causal_lm.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(output)


def _build(settings: SftSettings, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        max_position_embeddings=settings.max_tokens,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = register_packed_attention()
    return Qwen2ForCausalLM(config)


def _encode(
    pairs: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> list[tuple[list[int], int]]:
    """Return (token ids with the end token, length of the prompt) for every pair that fits the context."""
    prompts = tokenizer([pair["prompt"] for pair in pairs], add_special_tokens=False)["input_ids"]
    completions = tokenizer([pair["completion"] for pair in pairs], add_special_tokens=False)["input_ids"]
    encoded = [
        ([*prompt, *completion, tokenizer.eos_token_id], len(prompt))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    fitting = [(ids, start) for ids, start in encoded if len(ids) <= max_tokens]
    if not fitting:
        raise ValueError(f"none of the {len(pairs)} pairs fits {max_tokens} tokens; raise the context length")
    return fitting


def _fit(policy: PolicyModel, examples: list[tuple[list[int], int]], settings: SftSettings) -> None:
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    started, losses = time.monotonic(), []
    for step in range(settings.steps):
        rate = learning_rate(
            step,
            base=settings.learning_rate,
            warmup_steps=min(50, settings.steps // 10),
            total_steps=settings.steps,
            schedule="cosine",
            min_lr_ratio=0.05,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Take pairs in the order of the file, then from its start again: their order may be a curriculum.
        first = step * settings.batch_size
        chosen = [examples[index % len(examples)] for index in range(first, first + settings.batch_size)]
        logprobs, _ = policy(*_pack(chosen))
        loss = -logprobs.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % 20 == 0 or step + 1 == settings.steps:
            progress = {"step": step + 1, "steps": settings.steps, "loss": float(torch.stack(losses[-20:]).mean())}
            print(json.dumps(progress | {"seconds": time.monotonic() - started}), flush=True)


def _pack(examples: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor, tuple[int, ...], Tensor]:
    """Pack examples into the arguments of `PolicyModel.forward`; the tokens of completions are scored."""
    token_ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    boundaries = [0]
    for ids, start in examples:
        targets += range(boundaries[-1] + start, boundaries[-1] + len(ids))
        token_ids += ids
        positions += range(len(ids))
        boundaries.append(len(token_ids))
    return torch.tensor(token_ids), torch.tensor(positions), tuple(boundaries), torch.tensor(targets)


def main(arguments: Sequence[str]) -> int:
    """Run the program. Returns the exit status."""
    settings: dict[str, Any] = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    try:
        train(SftSettings(**settings))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
