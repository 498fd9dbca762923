"""The code inside one scoring process: sets limits, then scores one completion after another. `worker.py` starts it.

Memory is limited. Processor time is limited too: a completion may use as much as its deadline, rounded up to a whole
second. So a process that hangs in a reward ends even when its pool is gone or stopped. Output that a reward prints is
discarded; a reward reports a problem by raising.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

from verifier.base import Completion, RewardSpec, Score, Verdict
from verifier.scoring.messages import Failure, pack_result, unpack_completion
from verifier.scoring.scorer import Scorer, build_scorer

READY = b"ready"
"""First message of a process that can score. Any other first message is the reason why it cannot."""


def serve(connection: Connection, spec: Sequence[RewardSpec], memory_bytes: int, cpu_seconds: float) -> None:
    """Main function of the process: answers every completion with a Score or a Failure until the pipe closes.

    Args:
        connection: this process's end of the pipe to the pool.
        spec: the task's rewards.
        memory_bytes: limit of this process's address space.
        cpu_seconds: processor time per completion.

    Waits for: the next completion. Unblocked by: the pool, or the end of the pool's process.
    """
    os.setpgid(0, 0)
    own_pid = os.getpid()
    threading.Thread(target=_die_with_parent, name="watch-parent", daemon=True).start()
    _silence()
    # `num_workers` bounds the cores that scoring uses; NumPy in a reward must not start one thread per core.
    os.environ["OMP_NUM_THREADS"] = "1"
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        scorer = build_scorer(spec)
        scorer.grader.prepare()
    # A user's reward may raise any exception; the pool gets it as a message.
    except Exception as error:
        connection.send_bytes(_sentence(error).encode(errors="replace"))
        return
    connection.send_bytes(READY)
    with contextlib.suppress(EOFError):
        while True:
            completion = unpack_completion(connection.recv_bytes())
            _allow_processor(cpu_seconds)
            result = _score(scorer, completion)
            if os.getpid() != own_pid:
                # A reward forked and both processes returned; only the original one may answer.
                os._exit(1)
            connection.send_bytes(pack_result(result))


def _score(scorer: Scorer, completion: Completion) -> Score | Failure:
    try:
        score = scorer(completion)
    except MemoryError:
        return Failure(Verdict.CRASH, "it needs more memory than verifier.memory_bytes")
    # An exception, or a call of sys.exit, fails only this completion.
    except (Exception, SystemExit) as error:
        return Failure(Verdict.ERROR, _sentence(error))
    if _left_a_process():
        return Failure(Verdict.CRASH, "a reward left a process behind")
    return score


def _left_a_process() -> bool:
    """Whether this process has a child, running or ended, that no reward waited for."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
        return True
    return False


def _allow_processor(seconds: float) -> None:
    """Allow `seconds` more of processor time, rounded up; then SIGXCPU ends this process, even inside C code."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _silence() -> None:
    """Redirect standard output and error to /dev/null."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _die_with_parent() -> None:
    """Kill this process and its children when the actor's process ends.

    A reward that never lets this thread run is ended by the limit of processor time instead.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    # Also if the wait fails: a scoring process that does not watch its actor would outlive it.
    try:
        parent.join()
    finally:
        os.killpg(0, signal.SIGKILL)


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]
