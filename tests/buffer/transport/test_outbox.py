"""Which requests are sent again, and when: under virtual time, with neither sockets nor threads."""

import math

import pytest

from buffer.transport.outbox import FIRST_WINDOW_BYTES, LARGEST_WINDOW_BYTES, SOON_SECONDS, Outbox, Request

MB = 1 << 20


def request(number: int, num_bytes: int = 100, kind: str = "GroupDelivery") -> Request:
    return Request(number, kind, [b"", bytes(num_bytes)], math.inf, math.inf)


@pytest.fixture
def outbox() -> Outbox:
    return Outbox(resend_seconds=2.0)


def send(outbox: Outbox, now: float) -> list[int]:
    """Send what is due. The copies leave at once."""
    sent = outbox.to_send(now)
    for each in sent:
        outbox.sent(each, now)
    return [each.number for each in sent]


def test_the_time_between_copies_doubles_and_is_bounded(outbox: Outbox):
    outbox.add(request(0))
    moments = [now for now in range(100) if send(outbox, float(now))]
    assert moments[:6] == [0, 2, 6, 14, 22, 30]


def test_no_second_copy_before_the_first_has_left(outbox: Outbox):
    outbox.add(request(0, MB))
    [large] = outbox.to_send(0.0)
    has_left = False
    outbox.sent(large, 0.0, lambda: has_left)
    assert outbox.is_leaving() and send(outbox, 1000.0) == []
    has_left = True
    assert send(outbox, 1001.0) == [] and not outbox.is_leaving()
    assert send(outbox, 1002.9) == [] and send(outbox, 1003.0) == [0], "the time begins when the copy has left"


def test_an_answer_to_a_later_request_proves_that_an_earlier_delivery_was_lost(outbox: Outbox):
    delivery, parked, beat = request(0), request(1, kind="LeaseRequest"), request(2, kind="Heartbeat")
    for each in (delivery, parked, beat):
        outbox.add(each)
    assert send(outbox, 0.0) == [0, 1, 2]
    outbox.answered(beat, 0.1)
    assert send(outbox, 0.1) == [0], "a lease request may be parked, so its missing answer proves nothing"


def test_an_answer_to_an_earlier_request_proves_nothing(outbox: Outbox):
    beat, delivery = request(0, kind="Heartbeat"), request(1)
    outbox.add(beat)
    send(outbox, 0.0)
    outbox.add(delivery)
    send(outbox, 1.0)
    # The second copy of the heartbeat is sent after the delivery, but the answer may be that to the first.
    assert send(outbox, 2.0) == [0]
    outbox.answered(beat, 2.1)
    assert send(outbox, 2.1) == []


def test_everything_is_due_after_a_disconnect(outbox: Outbox):
    for number in range(3):
        outbox.add(request(number))
    send(outbox, 0.0)
    outbox.disconnected(0.5)
    assert send(outbox, 0.5) == [0, 1, 2]
    assert send(outbox, 2.4) == [] and send(outbox, 2.5) == [0, 1, 2], "the doubling begins anew"


def test_large_requests_wait_for_the_window_and_small_ones_do_not(outbox: Outbox):
    for number in range(4):
        outbox.add(request(number, FIRST_WINDOW_BYTES // 2))
    beat = request(4, kind="Heartbeat")
    outbox.add(beat)
    assert send(outbox, 0.0) == [4, 0, 1]
    assert outbox.next_due(0.0) == 2.0
    first = outbox.get(0)
    assert first is not None
    outbox.answered(first, 0.2)
    assert send(outbox, 0.2) == [2, 3], "an answer makes the window larger"


def test_one_large_request_is_on_its_way_whatever_its_size(outbox: Outbox):
    outbox.add(request(0, 2 * LARGEST_WINDOW_BYTES))
    outbox.add(request(1, MB))
    assert send(outbox, 0.0) == [0]


@pytest.mark.parametrize(("bytes_per_second", "in_flight"), [(1.0e6, 2.0e6), (10.0e6, 11.0e6), (1.0e9, 9.0e6)])
def test_what_is_on_its_way_is_what_the_link_carries_in_about_a_second(bytes_per_second: float, in_flight: float):
    outbox, now, sent, free = Outbox(resend_seconds=2.0), 0.0, 0, 0.0
    size = 400_000
    for number in range(200):
        outbox.add(request(number, size))
    on_the_link: list[tuple[float, Request]] = []
    most = 0
    while len(outbox):
        for each in outbox.to_send(now):
            outbox.sent(each, now)
            free = max(free, now) + size / bytes_per_second
            on_the_link.append((free, each))
            sent += 1
        if now > 20 * size / bytes_per_second:
            most = max(most, len(on_the_link) * size)
        now, arrived = on_the_link.pop(0)
        outbox.answered(arrived, now)
    assert sent == 200
    assert most <= in_flight
    assert most >= min(bytes_per_second * SOON_SECONDS / 2, LARGEST_WINDOW_BYTES / 2), "the link is never idle"


def test_a_link_that_needs_long_for_a_message_gets_longer_for_the_next(outbox: Outbox):
    first, second = request(0, MB), request(1, MB)
    outbox.add(first)
    send(outbox, 0.0)
    send(outbox, 2.0)
    outbox.answered(first, 5.0)
    outbox.add(second)
    send(outbox, 5.0)
    assert outbox.next_due(5.0) == 15.0


def test_time_in_which_the_process_was_stopped_does_not_count(outbox: Outbox):
    outbox.add(request(0))
    send(outbox, 0.0)
    outbox.postpone(60.0)
    assert send(outbox, 61.9) == [] and send(outbox, 62.0) == [0]
