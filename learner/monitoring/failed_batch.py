"""The file RUN_DIR/failed_batch.json: the batch on which the learner failed, for its next process to report.

The buffer sets groups aside on which the learner failed twice (`buffer/ledger/batches.py`). So only an error that the
batch itself may have caused is written: one that was raised while the batch was trained on, and that is not about
files, connections or other ranks. A process that was killed or told to stop writes nothing.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from buffer.transport.connection import RequestRefused
from buffer.transport.messages import LearnerHello
from learner.monitoring.stop_conditions import RunStoppedError

FILE_NAME = "failed_batch.json"
OF_A_BATCH = (ArithmeticError, AssertionError, LookupError, TypeError, ValueError, torch.OutOfMemoryError)
"""With several ranks, every other error may be that of a collective whose other ranks have ended."""


@dataclass(frozen=True, slots=True)
class FailedBatch:
    """A failure of one rank."""

    policy_version: int
    groups: tuple[str, ...]
    """Ids of the groups that the rank trained on."""
    error: str
    failure_id: str
    """Another one for every failure."""


def may_be_the_batchs(error: Exception, world_size: int) -> bool:
    """Return whether an error that was raised while a batch was trained on may come from the batch itself."""
    if isinstance(error, RunStoppedError | OSError | RequestRefused):
        return False
    return world_size == 1 or isinstance(error, OF_A_BATCH)


def save_failed_batch(run_dir: Path, policy_version: int, groups: Sequence[str], error: Exception) -> None:
    """Write the file, unless another rank has: its error came first. A full disk is no reason for another error."""
    failure = {
        "policy_version": policy_version,
        "groups": list(groups),
        "error": f"{type(error).__name__}: {error}",
        "failure_id": secrets.token_hex(8),
    }
    with suppress(OSError), (run_dir / FILE_NAME).open("x") as file:
        json.dump(failure, file)


def load_failed_batch(run_dir: Path) -> FailedBatch | None:
    """Read what a former process wrote; None when there is nothing, or nothing whole."""
    try:
        found = json.loads((run_dir / FILE_NAME).read_text())
        return FailedBatch(
            int(found["policy_version"]),
            tuple(map(str, found["groups"])),
            str(found["error"]),
            str(found["failure_id"]),
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None


def forget_failed_batch(run_dir: Path) -> None:
    """Remove the file, after the buffer has counted the failure."""
    with suppress(OSError):
        (run_dir / FILE_NAME).unlink(missing_ok=True)


def hello(policy_version: int, failed: FailedBatch | None) -> LearnerHello:
    """Return the hello of a learner at `policy_version` that reports how its predecessor failed."""
    if failed is None:
        return LearnerHello(policy_version)
    error = "".join(c if c.isprintable() else " " for c in failed.error)[:300]
    return LearnerHello(policy_version, failed.policy_version, failed.groups, error, failed.failure_id)
