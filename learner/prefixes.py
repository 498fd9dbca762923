"""What packed sequences have in common at their beginnings, such as the prompt of a group: computed once, not for each.

```
axis N      5 6 7 8 9 | 5 6 4 | 5 6 7 7        three sequences, as they are scored
computed    0 1 2 3 4       7         11       the places on N of the K tokens that go through the network
source      0 1 2 3 4   0 1 5   0 1 2 6        for each of N, the place on K of the token that stands for it
```

Under causal attention a token's state depends on nothing behind it, so equal prefixes have equal states.
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
    """Which K of N packed tokens are computed, and which of them stands for each of N."""

    computed: Tensor
    """[K] int64: indices into N."""
    source: Tensor
    """[N] int64: indices into K."""

    @classmethod
    def of(cls, sequences: Sequence[NDArray[np.integer]], device: torch.device) -> SharedPrefixes | None:
        """What each of `sequences` has in common with the one before it; None where that is too little."""
        sources: list[NDArray[np.int64]] = []
        computed: list[NDArray[np.int64]] = []
        start = num_computed = 0
        for index, ids in enumerate(sequences):
            common = _common(ids, sequences[index - 1]) if index else 0
            own = np.arange(num_computed, num_computed + len(ids) - common)
            sources.append(np.concatenate([sources[-1][:common], own]) if index else own)
            computed.append(np.arange(start + common, start + len(ids)))
            start, num_computed = start + len(ids), num_computed + len(own)
        if start - num_computed < WORTHWHILE_SHARE * start:
            return None
        tensors = (torch.from_numpy(np.concatenate(parts)).to(device) for parts in (computed, sources))
        return cls(*tensors)


def _common(one: NDArray[np.integer], other: NDArray[np.integer]) -> int:
    """Length of the longest common prefix."""
    shorter = min(len(one), len(other))
    differ = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differ[0]) if len(differ) else shorter
