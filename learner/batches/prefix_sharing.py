"""Which tokens of packed sequences run through the network.

A prefix that a sequence shares with the previous one, such as the prompt of a group, is computed once. Tokens at the
end that no score depends on are not computed at all.

```
axis N      5 6 7 8 9 | 5 6 4 3 | 5 6 4 7      three sequences; scores depend on 5, 3 and 4 of their tokens
computed    0 1 2 3 4       7          12      index into N of each of the K computed tokens
source      0 1 2 3 4   0 1 5 0   0 1 5 6      index into K for each of the N tokens
```

With causal attention the hidden state of a token depends on no later token. So equal prefixes have equal states, and
the tokens after the last state that is used can be left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WORTHWHILE_SHARE = 1 / 16
"""Smallest share of shared tokens for which sharing pays off: repeating keys and values for attention has a cost
too."""


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """The K computed tokens among N packed tokens, and the computed token whose state stands for each of the N."""

    computed: Tensor
    """[K] int64: indices into N."""
    source: Tensor
    """[N] int64: indices into K; 0 for tokens that no score depends on."""
    keys: Tensor
    """int64 indices into K: the keys of every sequence with computed tokens, prefix included, concatenated."""
    computed_ranges: tuple[range, ...]
    """For each sequence, the positions that are computed for this sequence itself."""

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        num_computed: Sequence[int],
        shared_prefix_lengths: Sequence[int],
        device: torch.device,
    ) -> SharedPrefixes | None:
        """Find the sharing between packed sequences; None when too few tokens are shared to pay off.

        Args:
            lengths: tokens of each sequence.
            num_computed: for each sequence, the number of leading tokens that scores depend on.
            shared_prefix_lengths: from `find_shared_prefix_lengths`; the first is ignored, because the previous
                sequence may be in another microbatch.
            device: of the tensors.
        """
        sources: list[NDArray[np.int64]] = []
        ranges: list[range] = []
        computed: list[NDArray[np.int64]] = []
        start = total = 0
        for length, end, first in zip(lengths, num_computed, (0, *shared_prefix_lengths[1:]), strict=True):
            source = np.zeros(length, dtype=np.int64)
            if first:
                source[:first] = sources[-1][:first]
            source[first:end] = np.arange(total, total + end - first)
            sources.append(source)
            ranges.append(range(first, end))
            computed.append(np.arange(start + first, start + end))
            start, total = start + length, total + end - first
        if not is_worthwhile(sum(positions.start for positions in ranges), start):
            return None
        keys = [source[: positions.stop] for source, positions in zip(sources, ranges, strict=True) if positions]
        all_computed, all_sources, all_keys = (
            torch.from_numpy(np.concatenate(parts)).to(device) for parts in (computed, sources, keys)
        )
        return cls(all_computed, all_sources, all_keys, tuple(ranges))


def is_worthwhile(num_shared: int, num_tokens: int) -> bool:
    """Return whether it pays off to compute `num_shared` of `num_tokens` packed tokens only once."""
    return num_shared >= WORTHWHILE_SHARE * num_tokens


def find_shared_prefix_lengths(sequences: Sequence[NDArray[np.integer]], num_computed: Sequence[int]) -> list[int]:
    """Return the length of the prefix that each sequence shares with the previous one; 0 for the first sequence.

    The prefix lies within the computed tokens of both.
    """
    lengths = [0]
    for index in range(1, len(sequences)):
        shared = _common_prefix_length(sequences[index], sequences[index - 1])
        lengths.append(min(shared, num_computed[index], num_computed[index - 1]))
    return lengths


def _common_prefix_length(one: NDArray[np.integer], other: NDArray[np.integer]) -> int:
    shorter = min(len(one), len(other))
    differ = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differ[0]) if len(differ) else shorter
