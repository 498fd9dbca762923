"""The output during a run, on a terminal and in a file."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from buffer.transport.messages import StageStatus, Wait
from launch.terminal import display
from launch.terminal.display import Display
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


@pytest.mark.parametrize(
    ("silent", "seconds", "expected"),
    [
        (0.5, 4.0, ""),
        (0.5, 80.0, "learner-0 trains on the batch for policy 12 since 80 s"),
        (12.0, 80.0, "learner-0 silent for 12 s, it trains on the batch for policy 12 since 80 s"),
    ],
)
def test_a_long_step_of_the_learner_is_named_and_not_called_silent(silent: float, seconds: float, expected: str):
    training = replace(
        LEARNER,
        waiting_for="",
        silent_seconds=silent,
        activity="trains on the batch for policy 12",
        activity_seconds=seconds,
    )
    console, stream = plain_console()
    with Display(console, 40) as shown:
        shown.status(status(training))
    assert stream.getvalue().endswith(f"4321 tokens/s{'; ' * bool(expected)}{expected}\n")


def test_the_limit_of_a_long_step_is_shown():
    working = replace(LEARNER, waiting_for="", activity="loads the model", activity_seconds=80.0, limit_seconds=600.0)
    for console, stream in (plain_console(), terminal()):
        with Display(console, 40) as shown:
            shown.status(status(replace(working, policy_version=-1)))
            assert "loads the model since 80 s (limit 600 s without progress)" in text_of(stream)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (StageStatus(), ""),
        (StageStatus(2, 5, 0.81, 200, 0), "stage 2 of 5, success 0.81 over 200 groups"),
        (StageStatus(1, 1, 0.5, 8, 12), "stage 1 of 1, success 0.50 over 8 groups, 12 prompts passed over"),
        (StageStatus(3, 3, 0.0, 0, 0), "stage 3 of 3"),
    ],
)
def test_the_curriculums_stage_is_shown_where_there_is_one(stage: StageStatus, expected: str):
    for console, stream in (plain_console(), terminal()):
        with Display(console, 40) as shown:
            shown.status(status(LEARNER, stage=stage))
            assert expected in text_of(stream)
            assert expected or "stage" not in text_of(stream)


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
    assert re.search(r"pending 0, leased 3, ready 5, used 16, done 192 +dropped +2 prompt_too_long", lines)
    assert re.search(r"learner-0 +waits for a batch +policy +12", lines)
    assert re.search(r"actor-1 +working", lines)


def test_the_buffers_notes_are_shown():
    for console, stream in (plain_console(), terminal()):
        with Display(console, 40) as shown:
            shown.status(replace(status(LEARNER), notes=("the buffer could not handle Close of learner-0",)))
        assert "the buffer could not handle Close of learner-0" in text_of(stream)


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


def test_a_wait_that_lasts_is_shown_with_its_length():
    actor = peer("actor", "actor-0", "prompts from the buffer", since=12.4)
    console, stream = plain_console()
    with Display(console, 40) as shown:
        shown.status(status(actor))
    assert stream.getvalue() == "step 12/40; actor-0 waits for prompts from the buffer since 12 s\n"
    waits = (Wait("the buffer", "space on the disk", 30.2), Wait("actor-0", "prompts", 12.4), Wait("x", "y", 0.1))
    console, stream = terminal()
    with Display(console, 40) as shown:
        shown.status(status(actor, waits=waits))
    assert re.search(r"actor-0 +waits for prompts from the buffer since 12 s", text_of(stream))
    assert re.search(r"the buffer +waits for space on the disk since 30 s", text_of(stream))
    # Waits of listed processes and short waits are not listed separately.
    assert not re.search(r"waits for prompts since", text_of(stream))
    assert "waits for y" not in text_of(stream)


def test_what_the_launcher_knows_and_what_processes_count_is_said():
    console, stream = plain_console()
    with Display(console, 40) as shown:
        shown.status(
            status(peer("actor", "actor-0", verifier_timeouts=3.0, verifier_errors=0.0)), ["actor-1 is halted"]
        )
    assert stream.getvalue() == ("step 12/40; actor-0: 3 completions could not be scored in time; actor-1 is halted\n")
    console, stream = terminal()
    with Display(console, 40) as shown:
        shown.starting(3.0, ["actor-1 was restarted once, last after status 1"])
    assert "actor-1 was restarted once" in text_of(stream)


def test_an_actor_of_somebody_else_is_forgotten_when_it_is_gone():
    gone = [peer("actor", name, silent_seconds=100.0) for name in ("actor-0", "actor-host-7")]
    console, stream = plain_console()
    with Display(console, 40) as shown:
        shown.status(status(*gone, peer("learner", "learner-0", silent_seconds=90.0)), started={"actor-0", "learner"})
    assert stream.getvalue() == "step 12/40; actor-0 silent for 100 s, learner-0 silent for 90 s\n"


def test_of_several_ranks_the_first_reports():
    console, stream = plain_console()
    with Display(console, 40) as shown:
        shown.status(status(peer("learner", "learner-1", idle_fraction=0.5), LEARNER))
    assert "reward 0.625, staleness 1.25; 210 samples/s" in stream.getvalue()
