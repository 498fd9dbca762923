"""What must be true of this machine and of the user's files before a run may start; each function raises ValueError.

Every message is one sentence: what is wrong, where, the value, and the way out.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.tasks.templates import template_names


def free_address(port: int, name: str, host: str = "127.0.0.1") -> str:
    """An endpoint at this machine's address `host`; port 0 becomes a free one.

    Raises:
        ValueError: the port is taken or not ours to take.
    """
    with socket.socket() as probe:
        # As the servers do: a port that only waits for the last packets of an ended process is free.
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
    """The section `task` with the user's files by their absolute paths: other processes may be started elsewhere.

    Names of templates, `hf:` sources and what does not exist stay as they are.
    """
    files = {name: task.get(name) for name in ("data_path", "eval_path", "template")}
    return {**task} | {
        name: str(Path(value).expanduser().absolute())
        for name, value in files.items()
        if isinstance(value, str) and value and value not in template_names() and Path(value).expanduser().exists()
    }


def check_folder(folder: Path, name: str) -> None:
    """Prove that `folder` can be made, or is there, and that files can be written there. Leaves nothing behind.

    Raises:
        ValueError: they cannot.
    """
    marker = nearest_folder(folder) / f".writable-{os.getpid()}"
    try:
        marker.touch()
        marker.unlink()
    except OSError as error:
        raise ValueError(f"{name}={folder} cannot be written: {error.strerror}; choose another") from error


def check_space(folder: Path, name: str, min_free_bytes: int) -> None:
    """Compare what is free where `folder` lies, or will lie, with what the run must have.

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
    """The folder itself, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())
