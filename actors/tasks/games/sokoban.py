"""Sokoban: push every box onto a target. The rewards are those of RAGEN:

    -0.1 per move, +1 a box onto a target, -1 off one, +10 all boxes on targets, -1 a turn without a readable action

Symbols: `#` wall, `_` floor, `O` target, `X` box, `V` box on a target, `P` player, `S` player on a target. Boards are
searched backwards from the solution, so the fewest moves to solve a problem are known and at most `depth`.

Options: `size` of the board, with outer walls; `boxes`; `depth`, the largest number of moves of a shortest solution;
`walls`, the number of walls inside; `actions_per_turn`; `words`, where 1 asks in English sentences. With `words` 0, the
question lists each symbol with row and column, without the outer walls, and moves are letters: `P12X22O32#24:` is
answered `<answer>D</answer>`. The teacher writes the next push before its answer.
"""

from __future__ import annotations

import json
import random
from functools import lru_cache

from actors.tasks.base import Drawn, Problem, TaskConfig, draw_problems, read_options
from actors.tasks.games.actions import INVALID_REWARD, noisy, read_actions, write_actions
from actors.tasks.games.episode import Step
from actors.tasks.games.grid import LETTER_ALPHABET, LETTERS, MOVES, NAMES, canonical, listed
from actors.tasks.games.sokoban_board import Board, State, moves_to_solution, read_board

OPTIONS = {
    "size": (6, 5, 10),
    "boxes": (1, 1, 3),
    "depth": (6, 1, 40),
    "walls": (1, 0, 8),
    "actions_per_turn": (3, 1, 10),
    "words": (0, 0, 1),
}
LISTED = "PSXVO#"
"""Symbols that a question without words lists, in this order; outer walls are left out."""
COMPLETION_ALPHABET = LISTED + LETTER_ALPHABET
POSITIONS_PER_BOARD = 8
MOVE_REWARD, BOX_REWARD, SOLVED_REWARD = -0.1, 1.0, 10.0
RULES = (
    "You play Sokoban: push every box onto a target. Boxes can be pushed, one at a time, never pulled.\n"
    "# wall, _ floor, O target, X box, V box on a target, P you, S you on a target.\n"
    "Moves: Up, Down, Left, Right. Give 1 to {actions_per_turn} moves, separated by ||, in <answer> tags, for example"
    " <answer>Right || Up</answer>.\n"
)


def problems(config: TaskConfig) -> tuple[list[Problem], list[Problem]]:
    """Draw (training, held-out) problems. Rotated and mirrored boards are on the same side of the split.

    The level is the fewest moves to the solution.

    Raises:
        ValueError: an unknown option, a value out of range, more moves than the turns allow, or too few levels.
    """
    options = read_options(config, OPTIONS)
    allowed = config.max_turns * options["actions_per_turn"]
    if options["depth"] > allowed:
        raise ValueError(
            f"task.options.depth is {options['depth']}, but task.max_turns={config.max_turns} turns of"
            f" task.options.actions_per_turn={options['actions_per_turn']} moves are only {allowed}; raise one of them"
        )

    standing, inner = options["walls"] + options["boxes"], (options["size"] - 2) ** 2
    if standing > inner // 2:
        raise ValueError(
            f"task.options.walls={options['walls']} and boxes={options['boxes']} fill more than half of the {inner}"
            f" cells inside a board of task.options.size={options['size']}; lower them or raise the size"
        )
    board, known = _searched_board(options, random.Random(config.seed))

    def draw(rng: random.Random) -> Drawn:
        nonlocal board, known
        # The search is expensive, so several problems come from one board.
        if rng.random() < 1 / POSITIONS_PER_BOARD:
            board, known = _searched_board(options, rng)
        state, moves = None, 0
        while state is None:
            # Uniform over the number of moves.
            moves = rng.randint(1, options["depth"])
            fitting = [state for state, needed in known.items() if needed == moves]
            if fitting:
                state = rng.choice(fitting)
            else:
                board, known = _searched_board(options, rng)
        rows = board.rows(state)
        gold = {"board": rows, **{name: options[name] for name in ("depth", "actions_per_turn", "words")}}
        return Drawn(canonical(rows), _question(board, state, options), json.dumps(gold), moves)

    return draw_problems(config, draw)


def _searched_board(options: dict[str, int], rng: random.Random) -> tuple[Board, dict[State, int]]:
    board = _random_board(options, rng)
    return board, moves_to_solution(board, options["depth"])


def _random_board(options: dict[str, int], rng: random.Random) -> Board:
    size = options["size"]
    inner = [(r, c) for r in range(1, size - 1) for c in range(1, size - 1)]
    outer = frozenset((r, c) for r in range(size) for c in range(size)) - frozenset(inner)
    drawn = rng.sample(inner, options["walls"] + options["boxes"])
    return Board(size, outer | frozenset(drawn[options["boxes"] :]), frozenset(drawn[: options["boxes"]]))


def _question(board: Board, state: State, options: dict[str, int]) -> str:
    if options["words"]:
        return RULES.format(actions_per_turn=options["actions_per_turn"]) + "\n".join(board.rows(state))
    rows = board.rows(state)
    inside = ["." * board.size, *("." + row[1:-1] + "." for row in rows[1:-1]), "." * board.size]
    return listed(inside, LISTED)


# The search of a large board takes tens of megabytes, so the cache is small. Only the teacher uses it.
_known_to_teacher = lru_cache(maxsize=256)(moves_to_solution)


def episode(problem: Problem, seed: int) -> SokobanEpisode:
    """Make an episode of `problem`. Nothing in the episode is random."""
    return SokobanEpisode(json.loads(problem.gold))


class SokobanEpisode:
    """One game.

    Args:
        gold: the problem's gold: `board`, `depth`, `actions_per_turn` and `words`.
    """

    def __init__(self, gold: dict[str, object]) -> None:
        self._options = {name: int(str(gold[name])) for name in ("depth", "actions_per_turn", "words")}
        rows = gold["board"]
        assert isinstance(rows, list)
        self._board, self._start = read_board(rows)
        self._state = self._start

    @property
    def solved(self) -> bool:
        """Whether every box is on a target."""
        return self._state.boxes == self._board.targets

    def reset(self) -> str:
        """Go back to the first position. Returns the question."""
        self._state = self._start
        return _question(self._board, self._state, self._options)

    def step(self, text: str) -> Step:
        """Make the moves of a turn one by one. Moves after the push that solves the problem are ignored."""
        names = NAMES if self._options["words"] else LETTERS
        moves = read_actions(text, names, self._options["actions_per_turn"])
        if moves is None:
            return Step(self._observation("Give valid moves."), INVALID_REWARD, done=False, valid=False)
        reward = 0.0
        for move in moves:
            on_target = len(self._state.boxes & self._board.targets)
            self._state = self._board.after(self._state, move)
            reward += MOVE_REWARD + BOX_REWARD * (len(self._state.boxes & self._board.targets) - on_target)
            if self.solved:
                return Step(self._observation("Solved."), reward + SOLVED_REWARD, done=True)
        return Step(self._observation("Still unsolved."), reward, done=False)

    def _observation(self, notice: str) -> str:
        if self._options["words"]:
            return notice + "\n" + "\n".join(self._board.rows(self._state))
        return _question(self._board, self._state, self._options)

    def teacher_turn(self, rng: random.Random, error_rate: float) -> str:
        """Write the next moves of a shortest solution. Each is random with probability `error_rate`.

        Every move is planned from the state after the move before it. Without words the turn begins with the
        next push of the plan, `D11`: down, from row 1 and column 1. A small model learns the path to the push step by
        step, but not in one step.
        """
        # Mistakes may lead further from the solution than any problem starts.
        known = _known_to_teacher(self._board, 2 * self._options["depth"])
        state, moves = self._state, list[str]()
        while len(moves) < self._options["actions_per_turn"] and state.boxes != self._board.targets:
            moves.append(noisy(self._best_move(state, known), list(MOVES), rng, error_rate))
            state = self._board.after(state, moves[-1])
        if self._options["words"]:
            return write_actions(moves)
        return self._next_push(known) + write_actions([move[0] for move in moves])

    def _best_move(self, state: State, known: dict[State, int]) -> str:
        return min(MOVES, key=lambda move: known.get(self._board.after(state, move), len(known)))

    def _next_push(self, known: dict[State, int]) -> str:
        """Return the first push of the plan, with the player's row and column before it. Empty if no plan is known."""
        state = self._state
        while known.get(state):
            move = self._best_move(state, known)
            following = self._board.after(state, move)
            if following.boxes != state.boxes:
                return f"{move[0]}{state.player[0]}{state.player[1]}"
            state = following
        return ""
