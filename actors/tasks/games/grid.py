"""Square boards written as text: cells, the four moves, and what two boards have in common that differ by a turn."""

from __future__ import annotations

from actors.tasks.games.actions import ALPHABET

Cell = tuple[int, int]
"""(row, column), from the upper left."""

MOVES: dict[str, Cell] = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}
NAMES = {name.lower(): name for name in MOVES}
LETTERS = {name[0].lower(): name for name in MOVES}
"""As the small embedded models write them."""
LETTER_ALPHABET = "".join(name[0] for name in MOVES) + ALPHABET + "0123456789:"


def step_to(cell: Cell, move: str) -> Cell:
    """The cell one move further."""
    return cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]


def sideways(move: str) -> tuple[str, str]:
    """The two moves across."""
    return ("Left", "Right") if MOVES[move][0] else ("Up", "Down")


def cells_of(rows: list[str], symbols: str) -> frozenset[Cell]:
    """The cells that hold one of `symbols`."""
    return frozenset((r, c) for r, row in enumerate(rows) for c, symbol in enumerate(row) if symbol in symbols)


def listed(rows: list[str], symbols: str) -> str:
    """What stands where, one symbol of `symbols` after the other, each with row and column: `P11O23G33:`.

    Small models see in it at once what they would have to count cells for on a board. The outermost cells are row 0 and
    column 0, so a board has at most 10 rows.
    """
    found = (f"{symbol}{r}{c}" for symbol in symbols for r, c in sorted(cells_of(rows, symbol)))
    return "".join(found) + ":"


def canonical(rows: list[str]) -> str:
    """The same text for the eight boards that are turned or mirrored images of each other."""
    images = []
    for _ in range(4):
        rows = ["".join(column) for column in zip(*reversed(rows), strict=True)]
        images += ["/".join(rows), "/".join(row[::-1] for row in rows)]
    return min(images)
