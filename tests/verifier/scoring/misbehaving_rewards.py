"""Graders for tests of the pool: a completion's text tells them to hang, crash, use memory, fork, print or raise."""

import math
import os
import re
import signal
import sys
import time
from pathlib import Path

from verifier.base import Completion, Grader, RewardFunction, Verdict

TABLE = {Verdict.CORRECT: 1.0, Verdict.WRONG: -0.5, Verdict.NO_ANSWER: -1.0}


def _obey(completion: Completion) -> Verdict:
    match completion.text.split():
        case ["hang"]:
            while True:
                time.sleep(0.01)
        case ["hang-once"]:
            # The gold is the path of a file that marks the first call.
            if not Path(completion.gold).exists():
                Path(completion.gold).touch()
                time.sleep(60)
            return Verdict.CORRECT
        case ["spin"]:
            while True:
                pass
        case ["spin-in-c"]:
            re.fullmatch(r"(a+)+", "a" * 60 + "b")
        case ["sleep", seconds]:
            time.sleep(float(seconds))
        case ["ask-for-one-thread"]:
            return Verdict.CORRECT if os.environ.get("OMP_NUM_THREADS") == "1" else Verdict.WRONG
        case ["crash"]:
            os.kill(os.getpid(), signal.SIGSEGV)
        case ["exit"]:
            os._exit(3)
        case ["sys.exit"]:
            sys.exit(3)
        case ["eat"]:
            hoard = []
            while True:
                hoard.append(bytes(1 << 27))
        case ["fork"]:
            os.fork()
        case ["fork-and-stay"]:
            if os.fork() == 0:
                os.setpgid(0, os.getppid())
                Path(completion.gold).write_text(str(os.getpid()))
                time.sleep(60)
        case ["raise"]:
            raise ArithmeticError("as told")
        case ["recurse"]:
            return _obey(completion)
        case ["print"]:
            for stream in (sys.stdout, sys.stderr):
                stream.write("x" * 10_000_000)
                stream.flush()
        case ["torch"]:
            return Verdict.WRONG if {"torch", "vllm"} & sys.modules.keys() else Verdict.CORRECT
        case ["pid"]:
            return Verdict.CORRECT if os.getpid() != int(completion.gold) else Verdict.WRONG
        case []:
            return Verdict.NO_ANSWER
    return Verdict.CORRECT if completion.text == completion.gold else Verdict.WRONG


def obedient() -> Grader:
    return Grader(_obey, TABLE)


def not_a_number() -> RewardFunction:
    return lambda completion: math.nan if completion.text == "nan" else 0.0


def broken_from_now_on(mark: str) -> Grader:
    """Cannot be built once the file `mark` exists."""
    if Path(mark).exists():
        raise ValueError("not any more")
    return Grader(_obey, TABLE)


def broken_in_workers(parent: int) -> Grader:
    """Cannot be built anywhere but in process `parent`."""
    if os.getpid() != parent:
        raise ValueError("not here")
    return Grader(_obey, TABLE)
