"""Square boards as text: cells, the four moves, and a canonical form of rotated and mirrored boards."""

from __future__ import annotations

from actors.tasks.games.actions import ALPHABET

Cell = tuple[int, int]
"""(row, column), counted from the upper left."""

MOVES: dict[str, Cell] = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}
NAMES = {name.lower(): name for name in MOVES}
LETTERS = {name[0].lower(): name for name in MOVES}
"""Moves as the small embedded models write them."""
LETTER_ALPHABET = "".join(name[0] for name in MOVES) + ALPHABET + "0123456789:"


def step_to(cell: Cell, move: str) -> Cell:
    """Return the neighboring cell in the direction of a move."""
    return cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]


def sideways(move: str) -> tuple[str, str]:
    """Return the two moves at a right angle to `move`."""
    return ("Left", "Right") if MOVES[move][0] else ("Up", "Down")


def cells_of(rows: list[str], symbols: str) -> frozenset[Cell]:
    """Return the cells that contain one of `symbols`."""
    return frozenset((r, c) for r, row in enumerate(rows) for c, symbol in enumerate(row) if symbol in symbols)


def listed(rows: list[str], symbols: str) -> str:
    """Write the board as a list of symbols with row and column, ordered by `symbols`: `P11O23G33:`.

    A small model reads positions from the list directly, instead of counting cells of a drawn board. Rows and columns
    start at 0 and have one digit, so a board has at most 10 rows.
    """
    found = (f"{symbol}{r}{c}" for symbol in symbols for r, c in sorted(cells_of(rows, symbol)))
    return "".join(found) + ":"


def canonical(rows: list[str]) -> str:
    """Return a text that is equal for the eight rotated and mirrored images of a board."""
    images = []
    for _ in range(4):
        rows = ["".join(column) for column in zip(*reversed(rows), strict=True)]
        images += ["/".join(rows), "/".join(row[::-1] for row in rows)]
    return min(images)
