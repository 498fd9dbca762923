from itertools import combinations, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from learner.packing import even_cuts, fewest_parts

AT_PAR = 10.0


def costs(lengths: list[int], cuts: tuple[int, ...] | list[int]) -> list[float]:
    return [sum(t + t * t / AT_PAR for t in lengths[start:stop]) for start, stop in pairwise(cuts)]


def allowed(lengths: list[int], budget: int) -> list[tuple[int, ...]]:
    """All ways to cut, by trying every one."""
    inner = range(1, len(lengths))
    every = [(0, *chosen, len(lengths)) for n in range(len(lengths)) for chosen in combinations(inner, n)]
    return [
        cuts
        for cuts in every
        if all(stop - start == 1 or sum(lengths[start:stop]) <= budget for start, stop in pairwise(cuts))
    ]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 60), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_no_other_cuts_are_fewer_or_more_even(lengths: list[int], budget: int, more: int):
    ways = allowed(lengths, budget)
    fewest = fewest_parts(lengths, budget)
    assert fewest == min(map(len, ways)) - 1
    number = min(fewest + more, len(lengths))
    cuts = even_cuts(lengths, budget, fewest + more, AT_PAR)
    assert tuple(cuts) in ways and len(cuts) - 1 == number
    best = min(max(costs(lengths, way)) for way in ways if len(way) - 1 <= number)
    assert max(costs(lengths, cuts)) <= best * (1 + 1e-6)


def test_attention_makes_one_long_sequence_as_dear_as_many_short_ones():
    lengths = [100, *[10] * 12]
    assert even_cuts(lengths, 1000, 2, 1e9) == [0, 2, 13]
    assert even_cuts(lengths, 1000, 2, 10.0) == [0, 1, 13]
