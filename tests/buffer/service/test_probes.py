"""The probes at the buffer: which actors are asked, until when, and which reports count."""

import dataclasses

import pytest

from buffer.service.probes import ACTORS_PER_ROUND, LIVE_SECONDS, MOST_TOKENS, Probes
from buffer.transport.messages import MOST_PROBED_TOKENS, Probe, ProbeReport, ProbeReports, Refused

PROBE = Probe(1, 7, (3, 4, 5, 6), 2)


def other(probe_id: int) -> Probe:
    return dataclasses.replace(PROBE, probe_id=probe_id)


def report(actor_id: str, probe: Probe = PROBE, num_logprobs: int = 2) -> ProbeReport:
    return ProbeReport(actor_id, probe.probe_id, 7, (-1.0,) * num_logprobs, 0.1)


def asked(probes: Probes, names: list[str], now: float = 0.0) -> list[str]:
    return [name for name in names if probes.due(name, now)]


def test_an_actor_is_asked_until_its_report_is_here():
    probes = Probes()
    assert probes.due("a", 0.0) == ()
    assert probes.request(PROBE, 0.0) == ProbeReports((), 1, 1)
    assert [probes.due("a", 0.1) for _ in range(3)] == [(PROBE,)] * 3
    probes.report(report("a"))
    assert probes.due("a", 0.2) == ()
    assert probes.request(PROBE, 0.3) == ProbeReports((report("a"),), 0, 1)


def test_before_the_first_actor_lives_the_round_waits_for_one():
    probes = Probes()
    assert probes.request(PROBE, 0.0) == ProbeReports((), 0, 0)
    assert asked(probes, ["a"]) == []
    assert probes.request(PROBE, 0.1) == ProbeReports((), 1, 1)
    assert asked(probes, ["a"]) == ["a"]


def test_every_actor_gets_its_turn_before_one_gets_a_second():
    names = [f"actor-{number}" for number in range(2 * ACTORS_PER_ROUND + 5)]
    probes, turns = Probes(), dict.fromkeys(names, 0)
    asked(probes, names)
    for number in range(1, 7):
        reply = probes.request(other(number), 0.0)
        assert isinstance(reply, ProbeReports) and reply.num_actors == len(names)
        this_round = asked(probes, names)
        assert len(this_round) == reply.num_unanswered == ACTORS_PER_ROUND
        for name in this_round:
            turns[name] += 1
            probes.report(report(name, other(number)))
        assert max(turns.values()) - min(turns.values()) <= 1
    assert min(turns.values()) == 2


def test_a_silent_actor_is_neither_asked_nor_waited_for():
    probes = Probes()
    asked(probes, ["a", "b"])
    assert probes.request(PROBE, 0.0) == ProbeReports((), 2, 2)
    probes.due("b", LIVE_SECONDS)
    assert probes.request(PROBE, LIVE_SECONDS + 1) == ProbeReports((), 1, 1)
    probes.request(other(2), LIVE_SECONDS + 1)
    assert asked(probes, ["a", "b"], LIVE_SECONDS + 1) == ["b"]


@pytest.mark.parametrize(
    "wrong", [report("stranger"), report("a", other(2)), report("a", num_logprobs=3)], ids=["who", "when", "length"]
)
def test_a_report_that_nobody_asked_for_changes_nothing(wrong: ProbeReport):
    probes = Probes()
    probes.report(wrong)
    asked(probes, ["a"])
    probes.request(PROBE, 0.0)
    probes.report(wrong)
    assert probes.request(PROBE, 0.0) == ProbeReports((), 1, 1)


def test_after_a_restart_the_next_request_begins_the_round_again():
    probes = Probes()
    asked(probes, ["a"])
    probes.report(report("a"))
    assert probes.request(PROBE, 0.0) == ProbeReports((), 1, 1)


@pytest.mark.parametrize(
    ("num_tokens", "num_scored"), [(4, 0), (4, 4), (MOST_TOKENS + 1, 2), (MOST_TOKENS, MOST_PROBED_TOKENS + 1), (0, 0)]
)
def test_a_probe_has_bounds(num_tokens: int, num_scored: int):
    reply = Probes().request(Probe(1, 7, (3,) * num_tokens, num_scored), 0.0)
    assert isinstance(reply, Refused) and f"scores {num_scored} of {num_tokens} tokens" in reply.reason
