"""Frozen lake: reach the goal over slippery ice without falling into a hole. Reward: +1 at the goal, 0 otherwise.

A move succeeds with probability 1 - `slip`/100; otherwise it goes to one of its two sides, with equal probability. The
episode's seed decides the slips, so the completions of one prompt get different slips. A turn without a readable
action has the reward -1 and does not move the player.

Symbols: `P` player, `_` ice, `O` hole, `G` goal, `X` player in a hole, `V` player on the goal. Every start has a path
to the goal around the holes.

Options: `size`; `holes`; `slip`, in percent (67: as in Gymnasium); `actions_per_turn`; `words`, where 1 asks in English
sentences. With `words` 0, the question lists each symbol with row and column: `P00G33O11O13O23:` is answered
`<answer>D</answer>`. The teacher writes a thought before its answer.
"""

from __future__ import annotations

import json
import random
from collections import deque
from functools import lru_cache

from actors.tasks.base import Drawn, Problem, TaskConfig, draw_problems, read_options
from actors.tasks.games.actions import INVALID_REWARD, noisy, read_actions, write_actions
from actors.tasks.games.episode import Step
from actors.tasks.games.grid import (
    LETTER_ALPHABET,
    LETTERS,
    MOVES,
    NAMES,
    Cell,
    canonical,
    cells_of,
    listed,
    sideways,
    step_to,
)

OPTIONS = {
    "size": (4, 3, 8),
    "holes": (2, 0, 20),
    "slip": (20, 0, 100),
    "actions_per_turn": (1, 1, 10),
    "words": (0, 0, 1),
}
LISTED = "PXVGO"
"""Symbols that a question without words lists, in this order."""
COMPLETION_ALPHABET = LISTED + LETTER_ALPHABET + "yn"
GOAL_REWARD = 1.0
RULES = (
    "You stand on a frozen lake. Walk to the goal without falling into a hole. The ice is slippery: a move goes to one"
    " of its two sides in {slip} of 100 cases.\n"
    "P you, _ ice, O hole, G goal.\n"
    "Moves: Up, Down, Left, Right. Give 1 to {actions_per_turn} moves, separated by ||, in <answer> tags, for example"
    " <answer>Right</answer>.\n"
)


def problems(config: TaskConfig) -> tuple[list[Problem], list[Problem]]:
    """Draw (training, held-out) problems. Rotated and mirrored lakes are on the same side of the split.

    The level is the number of moves of the shortest path.

    Raises:
        ValueError: an unknown option, a value out of range, more holes than the lake holds, or too few lakes.
    """
    options = read_options(config, OPTIONS)
    size, holes = options["size"], options["holes"]
    if holes > size * size // 2:
        raise ValueError(
            f"task.options.holes is {holes}, too many for a lake of {size} x {size}; use {size * size // 2} or fewer"
        )
    allowed = config.max_turns * options["actions_per_turn"]
    cells = [(r, c) for r in range(size) for c in range(size)]

    def draw(rng: random.Random) -> Drawn:
        while True:
            player, goal, *drawn = rng.sample(cells, 2 + holes)
            rows = _rows(size, player, goal, frozenset(drawn))
            moves = moves_to_goal(tuple(rows)).get(player)
            # The turns must allow one move more than the shortest path, because the ice is slippery.
            if moves is not None and 2 <= moves < allowed:
                break
        gold = {"lake": rows, **{name: options[name] for name in ("slip", "actions_per_turn", "words")}}
        return Drawn(canonical(rows), _question(rows, options), json.dumps(gold), moves)

    if allowed <= 2:
        raise ValueError(
            f"task.max_turns={config.max_turns} turns of task.options.actions_per_turn={options['actions_per_turn']}"
            " moves reach no goal; allow 3 moves or more"
        )
    return draw_problems(config, draw)


@lru_cache(maxsize=4096)
def moves_to_goal(rows: tuple[str, ...]) -> dict[Cell, int]:
    """Return the length of the shortest path to the goal around the holes, for every cell that has a path."""
    goals = list(cells_of(list(rows), "GV"))
    free = cells_of(list(rows), "P_GV")
    found = dict.fromkeys(goals, 0)
    queue = deque(goals)
    while queue:
        cell = queue.popleft()
        for move in MOVES:
            following = step_to(cell, move)
            if following in free and following not in found:
                found[following] = found[cell] + 1
                queue.append(following)
    return found


def chances(cell: Cell, move: str, size: int, slip: int) -> dict[Cell, float]:
    """Return the cells where a move may end, with their probabilities. A move off the board stays in its cell."""
    found: dict[Cell, float] = {}
    for direction, chance in ((move, 1 - slip / 100), *((side, slip / 200) for side in sideways(move))):
        to = _within(step_to(cell, direction), size)
        found[to] = found.get(to, 0.0) + chance
    return found


def _within(cell: Cell, size: int) -> Cell:
    return min(max(cell[0], 0), size - 1), min(max(cell[1], 0), size - 1)


def _rows(size: int, player: Cell, goal: Cell, holes: frozenset[Cell]) -> list[str]:
    def symbol(cell: Cell) -> str:
        if cell == player:
            return "X" if cell in holes else "V" if cell == goal else "P"
        return "O" if cell in holes else "G" if cell == goal else "_"

    return ["".join(symbol((r, c)) for c in range(size)) for r in range(size)]


def _question(rows: list[str], options: dict[str, int]) -> str:
    if options["words"]:
        rules = RULES.format(slip=options["slip"], actions_per_turn=options["actions_per_turn"])
        return rules + "\n".join(rows)
    return listed(rows, LISTED)


def episode(problem: Problem, seed: int) -> FrozenLakeEpisode:
    """Make an episode of `problem` with the slips of `seed`."""
    return FrozenLakeEpisode(json.loads(problem.gold), seed)


class FrozenLakeEpisode:
    """One walk from the start, to the goal or into a hole.

    Args:
        gold: the problem's gold: `lake`, `slip`, `actions_per_turn` and `words`.
        seed: seed of the slips.
    """

    def __init__(self, gold: dict[str, object], seed: int) -> None:
        self._options = {name: int(str(gold[name])) for name in ("slip", "actions_per_turn", "words")}
        rows = gold["lake"]
        assert isinstance(rows, list)
        self._first, self._seed, self._size = list(rows), seed, len(rows)
        self._holes = cells_of(rows, "OX")
        [self._goal] = cells_of(rows, "GV")
        [self._start] = cells_of(rows, "P")
        self.reset()

    @property
    def solved(self) -> bool:
        """Whether the player is on the goal."""
        return self._player == self._goal

    def reset(self) -> str:
        """Start over with the same slips. Returns the question."""
        self._player, self._slips = self._start, random.Random(self._seed)
        return _question(self._first, self._options)

    def step(self, text: str) -> Step:
        """Make the moves of a turn one by one, up to a hole or the goal."""
        names = NAMES if self._options["words"] else LETTERS
        moves = read_actions(text, names, self._options["actions_per_turn"])
        if moves is None:
            return Step(self._observation("Give a valid move."), INVALID_REWARD, done=False, valid=False)
        for move in moves:
            to = chances(self._player, move, self._size, self._options["slip"])
            [self._player] = self._slips.choices(list(to), weights=list(to.values()))
            if self.solved:
                return Step(self._observation("You reached the goal."), GOAL_REWARD, done=True)
            if self._player in self._holes:
                return Step(self._observation("You fell into a hole."), 0.0, done=True)
        return Step(self._observation("You are on the ice."), 0.0, done=False)

    def _observation(self, notice: str) -> str:
        rows = _rows(self._size, self._player, self._goal, self._holes)
        return "\n".join([notice, *rows]) if self._options["words"] else listed(rows, LISTED)

    def teacher_turn(self, rng: random.Random, error_rate: float) -> str:
        """Write the next moves of the shortest path, planned without slips.

        Each move is random with probability `error_rate`. Without words the turn begins with a thought, which a small
        model can learn step by step. The thought lists the moves towards the goal that are not on a shortest path
        (`D10n`: down leads to row 1, column 0, a hole or a detour), then the best move (`R01y`).
        """
        known = moves_to_goal(tuple(self._first))
        cell, moves = self._player, list[str]()
        while len(moves) < self._options["actions_per_turn"] and cell != self._goal:
            moves.append(noisy(self._best_move(cell, known), list(MOVES), rng, error_rate))
            cell = _within(step_to(cell, moves[-1]), self._size)
        if self._options["words"]:
            return write_actions(moves)
        return self._thought(known) + write_actions([move[0] for move in moves])

    def _best_move(self, cell: Cell, known: dict[Cell, int]) -> str:
        return min(MOVES, key=lambda move: known.get(_within(step_to(cell, move), self._size), len(known)))

    def _thought(self, known: dict[Cell, int]) -> str:
        best = self._best_move(self._player, known)
        written = {move: step_to(self._player, move) for move in MOVES if move == best or self._nears(move)}
        ordered = sorted(written, key=lambda move: move == best)
        return "".join(f"{m[0]}{written[m][0]}{written[m][1]}{'y' if m == best else 'n'}" for m in ordered)

    def _nears(self, move: str) -> bool:
        """Return whether a move reduces the distance to the goal but is not on a shortest path, because of a hole."""
        known, to = moves_to_goal(tuple(self._first)), step_to(self._player, move)
        towards = sum(abs(a - b) for a, b in zip(to, self._goal, strict=True))
        here = sum(abs(a - b) for a, b in zip(self._player, self._goal, strict=True))
        return towards < here and known.get(to, len(known)) >= known[self._player]
