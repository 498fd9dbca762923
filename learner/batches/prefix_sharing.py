"""Which of packed sequences' tokens go through the network: once what they have in common at their beginnings, such as
the prompt of a group, and nothing that no score depends on, such as the last token.

```
axis N      5 6 7 8 9 | 5 6 4 3 | 5 6 7 7      three sequences, as they are scored, of 5, 3 and 4 tokens that matter
computed    0 1 2 3 4       7          12      the places on N of the K tokens that go through the network
source      0 1 2 3 4   0 1 5 0   0 1 2 6      for each of N, the place on K of the token that stands for it
```

Under causal attention a token's state depends on nothing behind it, so equal prefixes have equal states, and what is
behind the last state that is asked for need not be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WORTHWHILE_SHARE = 1 / 16
"""Of the tokens. Repeating them for attention costs something too."""


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """Which K of N packed tokens are computed, and which of them stands for each of N that matters."""

    computed: Tensor
    """[K] int64: indices into N."""
    source: Tensor
    """[N] int64: indices into K; of tokens that do not matter 0."""
    keys: Tensor
    """int64: where on K those are that a sequence's own tokens attend to; of all sequences that have own ones, end to
    end."""
    own: tuple[range, ...]
    """Of each sequence, which of its tokens are computed for itself."""

    @classmethod
    def of(
        cls, lengths: Sequence[int], needed: Sequence[int], common: Sequence[int], device: torch.device
    ) -> SharedPrefixes | None:
        """None where too little is shared.

        Args:
            lengths: tokens of each sequence.
            needed: how many of its first ones matter.
            common: as `common_lengths` has it, of these sequences or of more before them.
            device: where the tensors are to live.
        """
        sources: list[NDArray[np.int64]] = []
        own: list[range] = []
        computed: list[NDArray[np.int64]] = []
        start = num_computed = 0
        for length, end, first in zip(lengths, needed, (0, *common[1:]), strict=True):
            source = np.zeros(length, dtype=np.int64)
            if first:
                source[:first] = sources[-1][:first]
            source[first:end] = np.arange(num_computed, num_computed + end - first)
            sources.append(source)
            own.append(range(first, end))
            computed.append(np.arange(start + first, start + end))
            start, num_computed = start + length, num_computed + end - first
        if not is_worthwhile(sum(part.start for part in own), start):
            return None
        keys = [source[: part.stop] for source, part in zip(sources, own, strict=True) if part]
        computed_of_all, source_of_all, keys_of_all = (
            torch.from_numpy(np.concatenate(parts)).to(device) for parts in (computed, sources, keys)
        )
        return cls(computed_of_all, source_of_all, keys_of_all, tuple(own))


def is_worthwhile(num_common: int, num_tokens: int) -> bool:
    """Whether it pays to compute `num_common` of `num_tokens` packed tokens but once."""
    return num_common >= WORTHWHILE_SHARE * num_tokens


def common_lengths(sequences: Sequence[NDArray[np.integer]], needed: Sequence[int]) -> list[int]:
    """Tokens that each of `sequences` has in common with the one before it, of the first `needed` of both."""
    lengths = [0]
    for index in range(1, len(sequences)):
        common = _common(sequences[index], sequences[index - 1])
        lengths.append(min(common, needed[index], needed[index - 1]))
    return lengths


def _common(one: NDArray[np.integer], other: NDArray[np.integer]) -> int:
    """Length of the longest common prefix."""
    shorter = min(len(one), len(other))
    differ = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differ[0]) if len(differ) else shorter
