"""Checks of this machine, the user's files and the rewards before a run starts.

Every message of a ValueError is one sentence: what is wrong, where, the value, and the way out.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.tasks.templates import template_names
from verifier.base import RewardSpec
from verifier.scoring.scorer import build_scorer


def free_address(port: int, name: str, host: str = "127.0.0.1") -> str:
    """The endpoint of a free port; port 0 becomes any free one.

    Args:
        port: number of the port, or 0.
        name: of the setting, for the message.
        host: an address of this machine.

    Raises:
        ValueError: the port is in use or may not be opened, or the machine does not have the address.
    """
    with socket.socket() as probe:
        # Like the servers: a port in TIME_WAIT, left by a process that has ended, counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            why = (
                "is in use on this machine" if error.errno == errno.EADDRINUSE else f"cannot be taken: {error.strerror}"
            )
            if error.errno == errno.EADDRNOTAVAIL:
                raise ValueError(f"cluster.host={host} is no address of this machine; choose one of those") from error
            raise ValueError(f"{name}={port} {why}; choose another, or 0 for any free one") from error
        return f"tcp://{host}:{probe.getsockname()[1]}"


def absolute_files(task: Mapping[str, Any]) -> dict[str, Any]:
    """The section `task` with absolute paths of the user's files, since processes may start in other folders.

    Template names, `hf:` sources and paths that do not exist stay as they are.
    """
    files = {name: task.get(name) for name in ("data_path", "eval_path", "template")}
    return {**task} | {
        name: str(Path(value).expanduser().absolute())
        for name, value in files.items()
        if isinstance(value, str) and value and value not in template_names() and Path(value).expanduser().exists()
    }


def check_rewards(rewards: Sequence[RewardSpec], *, is_multi_turn: bool) -> None:
    """Build the scorer as the scoring processes will.

    Raises:
        ValueError: one sentence if that fails, or if a multi-turn task has rewards.
    """
    if not is_multi_turn:
        build_scorer(rewards)
    elif rewards:
        raise ValueError(
            f"reward={[spec.name for spec in rewards]} would not be used, because the environment of a multi-turn task"
            " gives its rewards itself; leave it empty, reward=[]"
        )


def check_folder(folder: Path, name: str) -> None:
    """Check that `folder` exists or can be made, and that it is writable. Leaves nothing behind.

    Raises:
        ValueError: it is not writable.
    """
    marker = nearest_folder(folder) / f".writable-{os.getpid()}"
    try:
        marker.touch()
        marker.unlink()
    except OSError as error:
        raise ValueError(f"{name}={folder} cannot be written: {error.strerror}; choose another") from error


def check_space(folder: Path, name: str, min_free_bytes: int) -> None:
    """Check that the disk of `folder`, which need not exist yet, has enough free space.

    Raises:
        ValueError: too little is free.
    """
    free = shutil.disk_usage(nearest_folder(folder)).free
    if free < min_free_bytes:
        raise ValueError(
            f"{name}={folder} has {free / 1e6:.0f} MB free, less than the {min_free_bytes / 1e6:.0f} MB of"
            " cluster.min_free_bytes; free some or choose another"
        )


def nearest_folder(folder: Path) -> Path:
    """The folder itself, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())
