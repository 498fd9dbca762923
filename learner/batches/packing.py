"""Where a run of sequences is cut into microbatches: few, within a token budget, and of equal estimated cost.

Pure functions over lengths, called by `learner/batches/batch.py`. Sequences stay whole and in order, so that their
scored tokens stay one slice; with sharded parameters all ranks cut into equally many parts, and unequal costs would be
waited for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

_ROUNDS = 30
"""Halvings of the interval that holds the smallest possible largest cost."""


def fewest_parts(lengths: Sequence[int], common: Sequence[int], budget: int) -> int:
    """How few runs of whole sequences fit `budget` tokens each; a longer sequence stands alone.

    Args:
        lengths: tokens of each sequence.
        common: of them, those that are computed with the sequence before it where both are in one run.
        budget: computed tokens.
    """
    tokens = _Costs(lengths, common)
    return len(_fill(tokens, budget, tokens, budget)) - 1


def even_cuts(
    lengths: Sequence[int], common: Sequence[int], budget: int, num_parts: int, attention_crossover_tokens: float
) -> list[int]:
    """Bounds [num_parts + 1] of runs within `budget` tokens whose largest estimated cost is as small as can be.

    A sequence of T tokens costs T (1 + T / attention_crossover_tokens): its linear layers, and its attention, which
    costs as much at that length. After a sequence with the same first C tokens it costs C (1 + C /
    attention_crossover_tokens) less.

    Args:
        lengths: tokens of each sequence, at least one.
        common: as `fewest_parts` has it.
        budget: computed tokens; a longer sequence stands alone.
        num_parts: at least `fewest_parts`; with fewer sequences each is a part.
        attention_crossover_tokens: tokens.
    """
    tokens = _Costs(lengths, common)
    costs = _Costs(*([length * (1 + length / attention_crossover_tokens) for length in of] for of in (lengths, common)))
    low, high = costs.largest, costs.all_together
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
        # Larger sequences leave too few parts: the one with the most sequences becomes two.
        start, stop = max(pairwise(cuts), key=lambda part: part[1] - part[0])
        cuts = sorted([*cuts, (start + stop) // 2])
    return cuts


class _Costs:
    """What sequences cost in a row.

    Args:
        alone: of each, as the first of its run.
        less: of each, by how much less than that it costs after the one before it.
    """

    def __init__(self, alone: Sequence[float], less: Sequence[float]) -> None:
        own = [cost - saved for cost, saved in zip(alone, less, strict=True)]
        self._less, self._before = less, [0.0, *accumulate(own)]
        self.num_sequences = len(own)
        self.largest = max(own)
        """Of one sequence."""
        self.all_together = self._before[-1] + less[0]
        """As one run."""

    def end(self, first: int, limit: float) -> int:
        """Where the longest run from `first` on ends that costs no more than `limit`."""
        most = self._before[first] - self._less[first] + limit
        # A rounding error of the sums must not cost a part.
        return bisect_right(self._before, most + 1e-12 * self._before[-1]) - 1


def _fill(costs: _Costs, cost: float, tokens: _Costs, budget: float) -> list[int]:
    """Bounds of runs that are filled one after another up to both limits; at least one sequence each."""
    cuts = [0]
    while cuts[-1] < costs.num_sequences:
        first = cuts[-1]
        cuts.append(max(min(costs.end(first, cost), tokens.end(first, budget)), first + 1))
    return cuts
