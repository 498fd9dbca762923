"""Answers to weight probes, with an engine that the test plays."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.rollouts.probe import LEAST_LOGPROB, Prober
from buffer.transport.messages import Done, Message, Probe, ProbeReport

PROBE = Probe(5, 3, (7, 8, 9, 10), 2)


@dataclass
class Scored:
    policy_version: int
    logprobs: tuple[float, ...]


@dataclass
class Engine:
    """Answers with `answers` in turn."""

    answers: list[Scored | None]
    asked: list[tuple[Sequence[int], int, float]] = field(default_factory=list)

    async def score(
        self, token_ids: Sequence[int], num_scored: int, temperature: float, request_id: str
    ) -> Scored | None:
        self.asked.append((token_ids, num_scored, temperature))
        await asyncio.sleep(0)
        return self.answers.pop(0)


async def answers_to(prober: Prober, offers: Sequence[tuple[Sequence[Probe], int]]) -> list[Message]:
    """The reports after each of `offers`, once the prober is idle again."""
    sent: list[Message] = []

    async def send(message: Message) -> Message:
        sent.append(message)
        return Done()

    running = asyncio.create_task(prober.run(send))
    for offer in offers:
        prober.offer(*offer)
        # More turns of the event loop than the stand-ins take.
        for _ in range(20):
            await asyncio.sleep(0)
    running.cancel()
    return sent


def test_a_probe_is_scored_at_the_sampling_temperature_and_reported():
    engine = Engine([Scored(4, (-1.0, -2.0))])
    [report] = asyncio.run(answers_to(Prober("actor-1", 0.7, engine), [((PROBE,), 4)]))  # type: ignore[arg-type]
    assert isinstance(report, ProbeReport)
    assert (report.actor_id, report.probe_id, report.policy_version) == ("actor-1", 5, 4)
    assert report.logprobs == (-1.0, -2.0)
    assert engine.asked == [((7, 8, 9, 10), 2, 0.7)]


def test_older_weights_than_the_probe_asks_for_wait():
    engine = Engine([Scored(3, (-1.0, -2.0))])
    prober = Prober("actor-1", 1.0, engine)  # type: ignore[arg-type]
    assert len(asyncio.run(answers_to(prober, [((PROBE,), 2), ((), 3), ((PROBE,), 3)]))) == 1
    assert len(engine.asked) == 1


def test_weights_that_arrive_in_between_make_it_wait_for_the_next_offer():
    engine = Engine([None, Scored(4, (-1.0, -2.0))])
    prober = Prober("actor-1", 1.0, engine)  # type: ignore[arg-type]
    assert asyncio.run(answers_to(prober, [((PROBE,), 3)])) == []
    [report] = asyncio.run(answers_to(prober, [((PROBE,), 4)]))
    assert isinstance(report, ProbeReport) and report.policy_version == 4


def test_only_finite_numbers_are_sent():
    engine = Engine([Scored(3, (math.nan, -math.inf))])
    [report] = asyncio.run(answers_to(Prober("actor-1", 1.0, engine), [((PROBE,), 3)]))  # type: ignore[arg-type]
    assert isinstance(report, ProbeReport) and report.logprobs == (LEAST_LOGPROB, LEAST_LOGPROB)
