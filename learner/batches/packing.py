"""Cuts a list of sequences into microbatches: few, within a token budget, and of about equal cost.

Pure functions over lengths, called by `learner/batches/batch.py`. Sequences stay whole and in order, so the scored
tokens of a microbatch are one slice. With sharded parameters all ranks run equally many microbatches side by side, and
a rank with a cheap microbatch waits for the others. Equal costs keep that wait short.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

_ROUNDS = 30
"""Bisection steps in the search for the smallest cost limit."""


def fewest_parts(lengths: Sequence[int], shared_prefix_lengths: Sequence[int], budget: int) -> int:
    """Return the smallest number of microbatches of at most `budget` computed tokens each.

    A sequence of more tokens is a microbatch of its own.

    Args:
        lengths: tokens of each sequence.
        shared_prefix_lengths: for each sequence, the leading tokens that cost nothing when the previous sequence is in
            the same microbatch.
        budget: computed tokens of a microbatch.
    """
    tokens = _Costs(lengths, shared_prefix_lengths)
    return len(_fill(tokens, budget, tokens, budget)) - 1


def even_cuts(
    lengths: Sequence[int],
    shared_prefix_lengths: Sequence[int],
    budget: int,
    num_parts: int,
    attention_crossover_tokens: float,
) -> list[int]:
    """Return bounds [num_parts + 1] of microbatches within `budget` tokens, with the smallest possible largest cost.

    A sequence of T tokens costs T (1 + T / attention_crossover_tokens): T for its linear layers, the rest for its
    attention, which costs the same at T = attention_crossover_tokens. A shared prefix of C tokens saves
    C (1 + C / attention_crossover_tokens).

    Args:
        lengths: tokens of each sequence; at least one sequence.
        shared_prefix_lengths: as in `fewest_parts`.
        budget: computed tokens of a microbatch; a longer sequence is a microbatch of its own.
        num_parts: at least `fewest_parts`. With fewer sequences, each is a microbatch.
        attention_crossover_tokens: sequence length at which attention costs as much as the linear layers.
    """
    tokens = _Costs(lengths, shared_prefix_lengths)
    costs = _Costs(
        *([n * (1 + n / attention_crossover_tokens) for n in counts] for counts in (lengths, shared_prefix_lengths))
    )
    low, high = costs.largest, costs.total
    if len(_fill(costs, low, tokens, budget)) - 1 > num_parts:
        for _ in range(_ROUNDS):
            middle = (low + high) / 2
            if len(_fill(costs, middle, tokens, budget)) - 1 > num_parts:
                low = middle
            else:
                high = middle
        low = high
    cuts = _fill(costs, low, tokens, budget)
    while len(cuts) - 1 < min(num_parts, len(lengths)):
        # One long sequence sets the limit, and the others fill too few microbatches: halve the one with the most
        # sequences.
        start, stop = max(pairwise(cuts), key=lambda part: part[1] - part[0])
        cuts = sorted([*cuts, (start + stop) // 2])
    return cuts


class _Costs:
    """The costs of microbatches.

    Args:
        alone: cost of each sequence as the first of its microbatch.
        saved: what each sequence costs less after the previous one.
    """

    def __init__(self, alone: Sequence[float], saved: Sequence[float]) -> None:
        following = [cost - less for cost, less in zip(alone, saved, strict=True)]
        self._saved, self._before = saved, [0.0, *accumulate(following)]
        self.num_sequences = len(following)
        self.largest = max(following)
        """Largest cost of one sequence after the previous one."""
        self.total = self._before[-1] + saved[0]
        """Cost of all sequences as one microbatch."""

    def end(self, first: int, limit: float) -> int:
        """Return the end of the longest microbatch from sequence `first` on that costs at most `limit`."""
        most = self._before[first] - self._saved[first] + limit
        # The tolerance keeps rounding errors in the sums from adding a microbatch.
        return bisect_right(self._before, most + 1e-12 * self._before[-1]) - 1


def _fill(costs: _Costs, cost: float, tokens: _Costs, budget: float) -> list[int]:
    """Return bounds of microbatches, each filled up to both limits before the next begins; none is empty."""
    cuts = [0]
    while cuts[-1] < costs.num_sequences:
        first = cuts[-1]
        cuts.append(max(min(costs.end(first, cost), tokens.end(first, budget)), first + 1))
    return cuts
