import pytest

from benchmarks.parts.async_vs_sync.second_actor import Rate, report


def test_the_gain_is_held_against_the_work_that_two_cores_can_hold():
    one = [Rate(10.0, 1.0, 0.25, 2.0), Rate(8.0, 0.9, 0.35, 2.0), Rate(10.0, 1.0, 0.2, 2.0)]
    two = [Rate(15.0, 1.7, 0.3, 2.0), Rate(12.8, 1.7, 0.3, 2.0), Rate(14.0, 1.7, 0.3, 2.0)]
    figures = report(one, two)
    assert (figures["gain"], figures["gain_spread"]) == (pytest.approx(1.5), pytest.approx([1.4, 1.6]))
    assert figures["limit"] == pytest.approx(1.6) and figures["share_of_limit"] == pytest.approx(1.5 / 1.6)


def test_two_actors_do_no_more_than_twice_the_work_of_one_that_idles():
    assert report([Rate(10.0, 0.4, 0.1, 2.0)], [Rate(18.0, 0.8, 0.2, 2.0)])["limit"] == 2.0
