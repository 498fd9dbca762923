import os
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.prefixes import WORTHWHILE_SHARE, SharedPrefixes
from tests.learner.samples import CPU

SEQUENCES = st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=6), min_size=1, max_size=6)


def of(sequences: list[list[int]]) -> SharedPrefixes | None:
    return SharedPrefixes.of([np.array(ids) for ids in sequences], CPU)


@given(SEQUENCES)
@settings(max_examples=300, deadline=None)
def test_every_token_is_stood_for_by_one_with_the_same_beginning(sequences: list[list[int]]):
    shared = of(sequences)
    beginnings = [tuple(ids[: end + 1]) for ids in sequences for end in range(len(ids))]
    if shared is None:
        alike = sum(len(os.path.commonprefix(list(neighbors))) for neighbors in pairwise(sequences))
        assert alike < WORTHWHILE_SHARE * len(beginnings)
        return
    stands_for = shared.computed[shared.source].tolist()
    assert [beginnings[place] for place in stands_for] == beginnings
    # Whatever is computed stands for itself, and no two neighbors have a beginning computed twice.
    assert [stands_for[place] for place in shared.computed] == shared.computed.tolist()
    assert sorted(set(shared.source.tolist())) == list(range(len(shared.computed)))
    starts = np.cumsum([0, *map(len, sequences)])
    for first, second, third in zip(starts[:-2], starts[1:-1], starts[2:], strict=True):
        before, after = beginnings[first:second], beginnings[second:third]
        own = [place - second for place in shared.computed.tolist() if second <= place < third]
        assert own == [index for index, beginning in enumerate(after) if beginning not in before]


def test_a_prompt_is_computed_once_for_a_group():
    prompt = list(range(10, 20))
    shared = of([[*prompt, 1, 2], [*prompt, 3], [*prompt, 4, 5, 6], [7, *prompt]])
    assert shared is not None
    assert len(shared.computed) == 10 + 2 + 1 + 3 + 11


@pytest.mark.parametrize("sequences", [[[1, 2, 3]], [[1, 2], [3, 4]], [[1, *range(2, 20)], [1, *range(30, 48)]]])
def test_too_little_is_not_shared(sequences: list[list[int]]):
    assert of(sequences) is None
