"""The ways of `benchmarks/learner.py` that need only this project's packages: `ways.py NAME WORK.json`.

- ours: the learner's own functions, from received groups to metrics.
- packed, padded: steps written by hand with PyTorch and transformers, with the loss and no metrics.
- limit: the matrix products of the linear layers alone.
"""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

# The root of the project comes before this folder, where some files have the names of packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.parts.learner.work import LEARNING_RATE, Sequences, Turns, Work, save_gradient, sequences


def ours(work: Work, data: Sequences) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from benchmarks.parts.learner.step import OurStep
    from learner.models.policy import PolicyModel

    policy = PolicyModel.load(work.folder, dtype=torch.float32, temperature=1.0, checkpointing=False)
    step = OurStep(policy, data, work.tokens_per_microbatch, torch.device("cpu"))
    turns = Turns(parameters=sum(p.numel() for p in policy.parameters()))
    while turns.wait():
        step.accumulate()
        if turns.number == 1:
            save_gradient(work, "ours", [(name, p.grad) for name, p in policy.causal_lm.named_parameters()])
        step.finish()
        turns.done()


def packed(work: Work, data: Sequences) -> None:
    """Sequences packed end to end up to a budget of tokens; attention stays inside each sequence."""
    from transformers import AttentionInterface

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **named: Any) -> tuple[Any, None]:
        parts = zip(*(tensor.split(named["lengths"], dim=2) for tensor in (query, key, value)), strict=True)
        outputs = [scaled_dot_product_attention(*part, is_causal=True) for part in parts]
        return torch.cat(outputs, dim=2).transpose(1, 2), None

    AttentionInterface.register("packed_by_hand", attention)
    model = _model(work, "packed_by_hand")
    advantages, scored = torch.from_numpy(data.advantages).float(), _scored(data)

    def losses() -> Any:
        for start, stop in pairwise(_cuts(data, work.tokens_per_microbatch)):
            ids = torch.from_numpy(np.concatenate(data.token_ids[start:stop]))
            lengths = [len(x) for x in data.token_ids[start:stop]]
            positions = torch.cat([torch.arange(length) for length in lengths])
            body = model.model(ids[None], position_ids=positions[None], use_cache=False, lengths=lengths)
            mask = np.concatenate(
                [np.arange(n) >= p for n, p in zip(lengths, data.prompt_lengths[start:], strict=False)]
            )
            targets = torch.from_numpy(np.flatnonzero(mask))
            logits = model.lm_head(body.last_hidden_state[0][targets - 1])
            logprobs = logits.log_softmax(-1).gather(-1, ids[targets, None])[:, 0]
            completions = torch.tensor(lengths) - torch.tensor(data.prompt_lengths[start:stop])
            yield _loss(logprobs, advantages[start:stop].repeat_interleave(completions)).sum() / scored

    _train(work, "packed", model, losses)


def padded(work: Work, data: Sequences) -> None:
    """Sequences padded to the longest one of their microbatch."""
    model = _model(work, "sdpa")
    advantages, scored = torch.from_numpy(data.advantages).float(), _scored(data)

    def losses() -> Any:
        for start in range(0, work.num_sequences, work.rows_per_microbatch):
            rows = slice(start, start + work.rows_per_microbatch)
            lengths = [len(x) for x in data.token_ids[rows]]
            ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
            mask, completion = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
            for row, tokens in enumerate(data.token_ids[rows]):
                ids[row, : len(tokens)] = torch.from_numpy(tokens)
                mask[row, : len(tokens)] = 1
                completion[row, data.prompt_lengths[start + row] : len(tokens)] = True
            logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            yield (_loss(logprobs, advantages[rows, None]) * completion[:, 1:]).sum() / scored

    _train(work, "padded", model, losses)


def limit(work: Work, data: Sequences) -> None:
    """The matrix products of every linear layer, forward and backward, at the packed shapes, without attention."""
    hidden, wide = work.hidden_size, work.intermediate_size
    shapes = [(hidden, hidden)] * 4 + [(hidden, wide)] * 2 + [(wide, hidden)]
    weights = [torch.randn(shape) for shape in shapes]
    head = torch.randn(hidden, work.vocabulary)
    cuts = list(pairwise(_cuts(data, work.tokens_per_microbatch)))
    lengths, prompts = [len(x) for x in data.token_ids], data.prompt_lengths

    def products(x: Tensor, weight: Tensor) -> None:
        y = x @ weight
        y @ weight.T
        x.T @ y

    turns = Turns()
    while turns.wait():
        for start, stop in cuts:
            tokens = sum(lengths[start:stop])
            inputs = {width: torch.ones(tokens, width) for width in (hidden, wide)}
            for _ in range(work.num_layers):
                for weight in weights:
                    products(inputs[weight.shape[0]], weight)
            products(inputs[hidden][: tokens - sum(prompts[start:stop])], head)
        turns.done()


def _loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
    u = (logprobs - logprobs.detach()).exp()
    return -torch.minimum(u * advantages, u.clamp(0.8, 1.2) * advantages)


def _model(work: Work, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(work.folder, attn_implementation=attention).train()


def _train(work: Work, name: str, model: Any, losses: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    turns = Turns()
    while turns.wait():
        for loss in losses():
            loss.backward()
        if turns.number == 1:
            save_gradient(work, name, [(key, parameter.grad) for key, parameter in model.named_parameters()])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turns.done()


def _scored(data: Sequences) -> int:
    return data.num_tokens - sum(data.prompt_lengths)


def _cuts(data: Sequences, budget: int) -> list[int]:
    """Boundaries of the packed microbatches: each holds whole sequences of at most `budget` tokens."""
    cuts, used = [0], 0
    for index, tokens in enumerate(data.token_ids):
        if used and used + len(tokens) > budget:
            cuts.append(index)
            used = 0
        used += len(tokens)
    return [*cuts, len(data.token_ids)]


def main() -> None:
    name, work = sys.argv[1], Work.read(Path(sys.argv[2]))
    torch.set_num_threads(work.num_threads)
    {"ours": ours, "packed": packed, "padded": padded, "limit": limit}[name](work, sequences(work))
    # Exit without cleanup: gloo's threads may abort it.
    os._exit(0)


if __name__ == "__main__":
    main()
