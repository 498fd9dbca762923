"""Metrics over all actors: sums of counts, means of shares and seconds."""

from buffer.actor_metrics import over_actors


def test_counts_are_summed_and_shares_and_seconds_averaged_over_the_actors_that_report_them():
    reported = [
        {"tokens": 10.0, "idle_fraction": 0.0, "weight_pause_seconds": 1.0},
        {"tokens": 30.0, "idle_fraction": 0.5, "one_too_many": 1.0},
        {},
    ]
    assert over_actors(reported, 3) == {"tokens": 40.0, "idle_fraction": 0.25, "weight_pause_seconds": 1.0}
    assert over_actors([], 3) == {}
