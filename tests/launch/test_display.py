"""What a person sees while a run goes on, on a terminal and in a file."""

import io
import re

import pytest
from rich.console import Console

from launch import display
from launch.display import Display
from tests.launch.statuses import LEARNER, peer, report, status

ACTOR = peer("actor", "actor-0", "prompts from the buffer")
REPORTS = (report(0, 0.41), report(10, 0.875))


def plain_console() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=False, width=120), stream


def terminal() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=True, width=120, height=40, legacy_windows=False), stream


def text_of(stream: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_a_file_gets_one_line_with_everything():
    console, stream = plain_console()
    with Display(console, 40) as shown:
        shown.status(status(LEARNER, ACTOR, reports=REPORTS))
    assert stream.getvalue() == (
        "step 12/40; reward 0.625, staleness 1.25; 210 samples/s, 4321 tokens/s; pass@1 0.875 at policy 10;"
        " learner-0 waits for a batch, actor-0 waits for prompts from the buffer\n"
    )


def test_a_file_gets_a_line_only_now_and_then(monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    console, stream = plain_console()
    with Display(console, 40) as shown:
        for _ in range(100):
            shown.status(status(peer("actor", "actor-0")))
            clock[0] += 0.25
    assert stream.getvalue() == "step 12/40\n" * 3


def test_a_file_hears_of_pretraining_from_its_start_to_its_end():
    console, stream = plain_console()
    with Display(console, 40) as shown:
        for step in (20, 40, 60):
            shown.pretraining(step, 60, 1.5)
        shown.starting(3.0)
    assert stream.getvalue().splitlines() == [
        "pretraining the base model: step 20/60, loss 1.500",
        "pretraining the base model: step 60/60, loss 1.500",
    ]


def test_a_terminal_shows_a_bar_and_who_waits_for_whom():
    console, stream = terminal()
    with Display(console, 40) as shown:
        shown.status(status(LEARNER, ACTOR, peer("actor", "actor-1"), reports=REPORTS))
    lines = text_of(stream)
    for expected in ("training", "12/40", "0.625", "1.25", "4321", "0.410 at policy 0", "0.875 at policy 10"):
        assert expected in lines
    assert re.search(r"pending 0, leased 3, ready 5, used 16, done 192 +dropped +2", lines)
    assert re.search(r"learner-0 +waits for a batch +policy +12", lines)
    assert re.search(r"actor-1 +working", lines)


def test_a_terminal_names_a_silent_process():
    console, stream = terminal()
    with Display(console, 40) as shown:
        shown.status(status(peer("actor", "actor-0", silent_seconds=8.2)))
    assert re.search(r"actor-0 +silent for 8 s", text_of(stream))


def test_a_terminal_shows_pretraining_and_starting():
    console, stream = terminal()
    with Display(console, 40) as shown:
        shown.pretraining(20, 60, 1.5)
        shown.starting(7.0)
    assert "20/60" in text_of(stream)
    assert "loss 1.500" in text_of(stream)
    assert "starting vLLM and DeepSpeed, 7 s" in text_of(stream)


def test_before_the_first_step_there_are_no_numbers_to_show():
    console, stream = plain_console()
    with Display(console, 40) as shown:
        shown.status(status(peer("learner", "learner-0", "a batch"), policy_version=0))
    assert stream.getvalue() == "step 0/40; learner-0 waits for a batch\n"


def test_of_several_ranks_the_first_reports():
    console, stream = plain_console()
    with Display(console, 40) as shown:
        shown.status(status(peer("learner", "learner-1", idle_fraction=0.5), LEARNER))
    assert "reward 0.625, staleness 1.25; 210 samples/s" in stream.getvalue()
