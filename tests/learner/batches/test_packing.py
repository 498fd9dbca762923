from itertools import combinations, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from learner.batches.packing import even_cuts, fewest_parts

CROSSOVER = 10.0


@st.composite
def sequences(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Lengths, and the length of the prefix shared with the previous sequence."""
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=7))
    shared = [draw(st.integers(0, min(one, other))) for one, other in pairwise(lengths)]
    return lengths, [0, *shared] if draw(st.booleans()) else [0] * len(lengths)


def computed(lengths: list[int], shared: list[int], start: int, stop: int) -> int:
    return lengths[start] + sum(lengths[i] - shared[i] for i in range(start + 1, stop))


def costs(lengths: list[int], shared: list[int], cuts: tuple[int, ...] | list[int]) -> list[float]:
    alone, less = ([t + t * t / CROSSOVER for t in tokens] for tokens in (lengths, shared))
    return [alone[start] + sum(alone[i] - less[i] for i in range(start + 1, stop)) for start, stop in pairwise(cuts)]


def allowed(lengths: list[int], shared: list[int], budget: int) -> list[tuple[int, ...]]:
    """All cuts within the budget, by exhaustive search."""
    inner = range(1, len(lengths))
    every = [(0, *chosen, len(lengths)) for n in range(len(lengths)) for chosen in combinations(inner, n)]
    return [
        cuts
        for cuts in every
        if all(stop - start == 1 or computed(lengths, shared, start, stop) <= budget for start, stop in pairwise(cuts))
    ]


@given(sequences(), st.integers(1, 60), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_no_other_cuts_are_fewer_or_more_even(batch: tuple[list[int], list[int]], budget: int, more: int):
    lengths, shared = batch
    ways = allowed(lengths, shared, budget)
    fewest = fewest_parts(lengths, shared, budget)
    assert fewest == min(map(len, ways)) - 1
    number = min(fewest + more, len(lengths))
    cuts = even_cuts(lengths, shared, budget, fewest + more, CROSSOVER)
    assert tuple(cuts) in ways and len(cuts) - 1 == number
    best = min(max(costs(lengths, shared, way)) for way in ways if len(way) - 1 <= number)
    assert max(costs(lengths, shared, cuts)) <= best * (1 + 1e-6)


def test_attention_makes_one_long_sequence_as_dear_as_many_short_ones():
    lengths = [100, *[10] * 12]
    assert even_cuts(lengths, [0] * 13, 1000, 2, 1e9) == [0, 2, 13]
    assert even_cuts(lengths, [0] * 13, 1000, 2, 10.0) == [0, 1, 13]
