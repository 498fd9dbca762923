"""What runs inside one scoring process: limits first, then one completion after another.

Memory and processor time are limited: a completion may use the processor for its deadline, rounded up to a second of
the process, so that a process whose pool is gone or halted ends too. What a reward prints goes nowhere: what it has to
say it raises. `worker.py` is the other half.
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
"""What a process says when it can score; anything else is the reason why it can't."""


def serve(connection: Connection, spec: Sequence[RewardSpec], memory_bytes: int, cpu_seconds: float) -> None:
    """What the process does: limits, the scorer, then a score or a Failure per completion until the pipe closes."""
    os.setpgid(0, 0)
    own_pid = os.getpid()
    threading.Thread(target=_die_with_parent, name="watch-parent", daemon=True).start()
    _silence()
    # A pool has as many processes as it may have threads; a reward that imports NumPy must not start one per core.
    os.environ["OMP_NUM_THREADS"] = "1"
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        scorer = build_scorer(spec)
        scorer.grader.prepare()
    # Said through the pipe, since a reward of the user's may raise anything.
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
                # A reward that forked and came back twice: only one of the two may answer.
                os._exit(1)
            connection.send_bytes(pack_result(result))


def _score(scorer: Scorer, completion: Completion) -> Score | Failure:
    try:
        score = scorer(completion)
    except MemoryError:
        return Failure(Verdict.CRASH, "it needs more memory than verifier.memory_bytes")
    # Whatever a reward raises, even a wish to exit, is this completion's failure and no other's.
    except (Exception, SystemExit) as error:
        return Failure(Verdict.ERROR, _sentence(error))
    if _left_a_process():
        return Failure(Verdict.CRASH, "a reward left a process behind")
    return score


def _left_a_process() -> bool:
    """Whether a child of this process, running or ended, was not waited for."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
        return True
    return False


def _allow_processor(seconds: float) -> None:
    """Let this process use the processor for so long from now on, rounded up; then SIGXCPU ends it, in C code too."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _silence() -> None:
    """Standard output and error lead nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _die_with_parent() -> None:
    """Ends this process when the actor was killed; one that lets no thread run ends at its limit of processor time."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]
