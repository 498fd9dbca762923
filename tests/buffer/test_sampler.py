import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.admission import Limits
from buffer.sampler import ReadyGroup, balance, fifo


def test_fifo_takes_the_groups_due_first_and_returns_issue_order():
    ready = [ReadyGroup(9, 4), ReadyGroup(3, 5), ReadyGroup(1, 5), ReadyGroup(7, 4)]
    assert fifo(ready, {}, {4: 2, 5: 2}, 5, Limits(4, 3)) == [1, 7, 9]


def test_fifo_waits_for_enough_groups_and_for_leases_that_are_due():
    limits = Limits(1, 2)
    assert fifo([ReadyGroup(0, 5)], {}, {5: 1}, 5, limits) == []
    ready = [ReadyGroup(0, 5), ReadyGroup(1, 5)]
    assert fifo(ready, {4: 1}, {5: 2}, 5, limits) == []
    assert fifo(ready, {5: 1}, {5: 2}, 5, limits) == [0, 1]


@given(st.integers(1, 4).flatmap(lambda r: st.tuples(st.just(r), st.integers(1, 6))), st.data())
def test_shards_are_equal_complete_and_balanced(shape: tuple[int, int], data: st.DataObject):
    world_size, places = shape
    size = world_size * places
    num_tokens = data.draw(st.lists(st.integers(1, 10_000), min_size=size, max_size=size))
    shards = balance(num_tokens, world_size)
    assert [len(shard) for shard in shards] == [places] * world_size
    assert sorted(index for shard in shards for index in shard) == list(range(size))
    assert all(shard == sorted(shard) for shard in shards)
    loads = [sum(num_tokens[i] for i in shard) for shard in shards]
    assert max(loads) - min(loads) <= max(num_tokens)
    assert shards == balance(num_tokens, world_size)


def test_balance_separates_the_long_groups():
    assert balance([100, 100, 1, 1], 2) == [[0, 2], [1, 3]]


@pytest.mark.parametrize(("size", "world_size"), [(3, 2), (1, 4), (2, 0)])
def test_balance_refuses_unequal_shards(size: int, world_size: int):
    with pytest.raises(ValueError, match=f"{size} groups cannot be cut into {world_size} equal shards"):
        balance([1] * size, world_size)
