"""Sokoban's board and states, and the distance of every state from the solution."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from actors.tasks.games.grid import MOVES, Cell, cells_of, step_to


@dataclass(frozen=True, slots=True)
class State:
    """The parts of a position that move."""

    player: Cell
    boxes: frozenset[Cell]


@dataclass(frozen=True, slots=True)
class Board:
    """The parts of a position that stay."""

    size: int
    walls: frozenset[Cell]
    targets: frozenset[Cell]

    def after(self, state: State, move: str) -> State:
        """Return the state after a move; unchanged if a wall or a second box is in the way."""
        to = step_to(state.player, move)
        if to in self.walls:
            return state
        if to not in state.boxes:
            return State(to, state.boxes)
        beyond = step_to(to, move)
        if beyond in self.walls or beyond in state.boxes:
            return state
        return State(to, state.boxes - {to} | {beyond})

    def rows(self, state: State) -> list[str]:
        """Write the board as text, with the outer walls."""

        def symbol(cell: Cell) -> str:
            if cell in self.walls:
                return "#"
            on_target = cell in self.targets
            if cell in state.boxes:
                return "V" if on_target else "X"
            if cell == state.player:
                return "S" if on_target else "P"
            return "O" if on_target else "_"

        return ["".join(symbol((r, c)) for c in range(self.size)) for r in range(self.size)]


def read_board(rows: list[str]) -> tuple[Board, State]:
    """Read a board and its state from text; the inverse of `Board.rows`."""
    board = Board(len(rows), cells_of(rows, "#"), cells_of(rows, "OVS"))
    [player] = cells_of(rows, "PS")
    return board, State(player, cells_of(rows, "XV"))


def moves_to_solution(board: Board, limit: int) -> dict[State, int]:
    """Find the fewest moves to the solution for every state with at most `limit`.

    The search is breadth-first, backwards from the solution.
    """
    ends = [State(cell, board.targets) for cell in _floor(board) if cell not in board.targets]
    found = dict.fromkeys(ends, 0)
    queue = deque(ends)
    while queue:
        state = queue.popleft()
        if found[state] == limit:
            break
        for before in _before(board, state):
            if before not in found:
                found[before] = found[state] + 1
                queue.append(before)
    return found


def _before(board: Board, state: State) -> list[State]:
    """Return the states from which one move leads to `state`: a step, or a push of the box ahead of the player."""
    found = []
    for down, right in MOVES.values():
        r, c = state.player
        origin, ahead = (r - down, c - right), (r + down, c + right)
        if origin in board.walls or origin in state.boxes:
            continue
        found.append(State(origin, state.boxes))
        if ahead in state.boxes:
            found.append(State(origin, state.boxes - {ahead} | {state.player}))
    return found


def _floor(board: Board) -> list[Cell]:
    return [(r, c) for r in range(board.size) for c in range(board.size) if (r, c) not in board.walls]
