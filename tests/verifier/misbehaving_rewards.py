"""Graders that hang, crash, eat memory or raise when the completion tells them to; for the tests of the pool."""

import os
import signal
import sys
import time

from verifier.base import Completion, Grader, Verdict

TABLE = {Verdict.CORRECT: 1.0, Verdict.WRONG: -0.5, Verdict.NO_ANSWER: -1.0}


def _obey(completion: Completion) -> Verdict:
    match completion.text.split():
        case ["hang"]:
            while True:
                time.sleep(0.01)
        case ["spin"]:
            while True:
                pass
        case ["sleep", seconds]:
            time.sleep(float(seconds))
        case ["crash"]:
            os.kill(os.getpid(), signal.SIGSEGV)
        case ["exit"]:
            os._exit(3)
        case ["eat"]:
            hoard = bytearray(3 << 30)
            return Verdict.CORRECT if hoard else Verdict.WRONG
        case ["raise"]:
            raise ArithmeticError("as told")
        case ["torch"]:
            return Verdict.WRONG if {"torch", "vllm"} & sys.modules.keys() else Verdict.CORRECT
        case ["pid"]:
            return Verdict.CORRECT if os.getpid() != int(completion.gold) else Verdict.WRONG
        case []:
            return Verdict.NO_ANSWER
    return Verdict.CORRECT if completion.text == completion.gold else Verdict.WRONG


def obedient() -> Grader:
    return Grader(_obey, TABLE)


def broken_in_workers(parent: int) -> Grader:
    """Cannot be built anywhere but in process `parent`."""
    if os.getpid() != parent:
        raise ValueError("not here")
    return Grader(_obey, TABLE)
