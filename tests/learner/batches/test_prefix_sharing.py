import os
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.batches.prefix_sharing import WORTHWHILE_SHARE, SharedPrefixes, find_shared_prefix_lengths
from tests.learner.samples import CPU

SEQUENCES = st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=6), min_size=1, max_size=6)


def of(sequences: list[list[int]], num_computed: list[int] | None = None) -> SharedPrefixes | None:
    lengths = [len(ids) for ids in sequences] if num_computed is None else num_computed
    shared = find_shared_prefix_lengths([np.array(ids) for ids in sequences], lengths)
    return SharedPrefixes.of([len(ids) for ids in sequences], lengths, shared, CPU)


@given(SEQUENCES, st.data())
@settings(max_examples=300, deadline=None)
def test_every_token_that_matters_is_stood_for_by_one_with_the_same_beginning(
    sequences: list[list[int]], data: st.DataObject
):
    num_computed = [data.draw(st.integers(0, len(ids))) for ids in sequences]
    shared, mattering = (
        of(sequences, num_computed),
        [ids[:length] for ids, length in zip(sequences, num_computed, strict=True)],
    )
    alike = sum(len(os.path.commonprefix(list(neighbors))) for neighbors in pairwise(mattering))
    if shared is None:
        assert alike < WORTHWHILE_SHARE * sum(map(len, sequences))
        return
    starts = np.cumsum([0, *map(len, sequences)]).tolist()
    places = [start + end for start, ids in zip(starts, mattering, strict=False) for end in range(len(ids))]
    beginnings = {
        start + end: tuple(ids[: end + 1])
        for start, ids in zip(starts, sequences, strict=False)
        for end in range(len(ids))
    }
    stands_for = shared.computed[shared.source].tolist()
    assert len(stands_for) == starts[-1]
    assert [beginnings[stands_for[place]] for place in places] == [beginnings[place] for place in places]
    # Only needed tokens are computed, each is its own source, and neighbors compute no shared prefix twice.
    computed = shared.computed.tolist()
    assert set(computed) <= set(places) and len(computed) == len(places) - alike
    assert [stands_for[place] for place in computed] == computed
    assert [start + i for start, own in zip(starts, shared.computed_ranges, strict=False) for i in own] == computed


def test_a_prompt_is_computed_once_for_a_group():
    prompt = list(range(10, 20))
    shared = of([[*prompt, 1, 2], [*prompt, 3], [*prompt, 4, 5, 6], [7, *prompt]])
    assert shared is not None
    assert len(shared.computed) == 10 + 2 + 1 + 3 + 11


@pytest.mark.parametrize("sequences", [[[1, 2, 3]], [[1, 2], [3, 4]], [[1, *range(2, 20)], [1, *range(30, 48)]]])
def test_too_little_is_not_shared(sequences: list[list[int]]):
    assert of(sequences) is None
