"""Where a run of sequences is cut into microbatches: few, within a token budget, and of equal estimated cost.

Pure functions over lengths, called by `learner/batch.py`. Sequences stay whole and in order, so that their scored
tokens stay one slice; with sharded parameters all ranks cut into equally many parts, and unequal costs would be waited
for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 30
"""Halvings of the interval that holds the smallest possible largest cost."""


def fewest_parts(lengths: Sequence[int], budget: int) -> int:
    """How few runs of whole sequences fit `budget` tokens each; a longer sequence stands alone."""
    return len(_fill(np.asarray(lengths), budget, np.asarray(lengths), budget)) - 1


def even_cuts(lengths: Sequence[int], budget: int, num_parts: int, tokens_at_par: float) -> list[int]:
    """Bounds [num_parts + 1] of runs within `budget` tokens whose largest estimated cost is as small as can be.

    A sequence of T tokens costs T (1 + T / tokens_at_par): its linear layers, and its attention, which costs as much at
    that length.

    Args:
        lengths: tokens of each sequence, at least one.
        budget: tokens; a longer sequence stands alone.
        num_parts: at least `fewest_parts`; with fewer sequences each is a part.
        tokens_at_par: tokens.
    """
    tokens = np.asarray(lengths)
    costs = tokens * (1 + tokens / tokens_at_par)
    low, high = float(costs.max()), float(costs.sum())
    if len(_fill(costs, low, tokens, budget)) - 1 > num_parts:
        for _ in range(_ROUNDS):
            middle = (low + high) / 2
            if len(_fill(costs, middle, tokens, budget)) - 1 > num_parts:
                low = middle
            else:
                high = middle
        low = high
    cuts = _fill(costs, low, tokens, budget)
    while len(cuts) - 1 < min(num_parts, len(tokens)):
        # Larger sequences leave too few parts: the one with the most sequences becomes two.
        start, stop = max(pairwise(cuts), key=lambda part: part[1] - part[0])
        cuts = sorted([*cuts, (start + stop) // 2])
    return cuts


def _fill(costs: NDArray[np.float64], cost: float, tokens: NDArray[np.int64], budget: int) -> list[int]:
    """Bounds of runs that are filled one after another up to both limits; at least one sequence each."""
    # Lists: a search in them takes a tenth of one in an array.
    spent, used = np.cumsum(costs).tolist(), np.cumsum(tokens).tolist()
    cuts = [0]
    while cuts[-1] < len(tokens):
        first = cuts[-1]
        spent_before, used_before = (spent[first - 1], used[first - 1]) if first else (0, 0)
        # A rounding error of the cumulative sum must not cost a part.
        by_cost = bisect_right(spent, (spent_before + cost) * (1 + 1e-12))
        by_tokens = bisect_right(used, used_before + budget)
        cuts.append(max(min(by_cost, by_tokens), first + 1))
    return cuts
