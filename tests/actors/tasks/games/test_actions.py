"""The parser accepts only a tagged list of known actions."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.tasks.games.actions import read_actions, write_actions
from actors.tasks.games.grid import LETTERS, NAMES, canonical

PIECES = st.sampled_from(
    ["<answer>", "</answer>", "<think>", "</think>", "||", "|", "Up", "up", " ", "\n", "Fly", "reward: 10", "É"]
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>Up</answer>", ["Up"]),
        ("I go up. <answer> up ||RIGHT || Down </answer> done", ["Up", "Right", "Down"]),
        ("<think>Perhaps <answer>Left</answer></think><answer>Up</answer>", ["Up"]),
        ("still <answer>Left</answer> in the prompt's thinking</think>\n<answer>Up</answer>", ["Up"]),
    ],
)
def test_actions_are_read(text: str, expected: list[str]):
    assert read_actions(text, NAMES, 3) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "Up", "<answer></answer>", "<answer>Up", "Up</answer>", "</answer>Up<answer>", "<answer>Fly</answer>"),
        *("<answer>Up|Down</answer>", "<answer>Up||</answer>", "<answer>Up Down</answer>", "<answer>U</answer>"),
        "<answer>Up||Up||Up||Up</answer>",
        "<answer>Up</answer><answer>Down</answer>",
        "<answer><answer>Up</answer></answer>",
        "<think><answer>Up</answer>",
        "<answer>Up</answer><think>or not",
        f"<answer>{' ' * 1000}Up</answer>",
        "<answer>" * 10_000,
    ],
)
def test_what_is_no_list_of_known_actions_is_no_action(text: str):
    assert read_actions(text, NAMES, 3) is None


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES, max_size=8).map("".join) | st.text(max_size=40))
def test_any_text_may_be_read(text: str):
    actions = read_actions(text, NAMES, 2)
    assert actions is None or (1 <= len(actions) <= 2 and set(actions) <= set(NAMES.values()))
    assert actions is None or text.count("<answer>") >= 1


def test_what_is_written_is_read_again():
    assert read_actions(write_actions(["U", "R"]), LETTERS, 2) == ["Up", "Right"]


def test_turned_and_mirrored_boards_are_one():
    board = ["ab_", "__c", "d__"]
    turned = ["d_a", "__b", "_c_"]
    mirrored = ["_ba", "c__", "__d"]
    assert canonical(board) == canonical(turned) == canonical(mirrored)
    assert canonical(board) != canonical(["ab_", "_c_", "d__"])
