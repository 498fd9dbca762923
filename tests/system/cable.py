"""A simulated network cable between two network namespaces that can delay frames, lose frames, or be cut.

Each end is a TAP interface inside its namespace. A thread of this process carries the Ethernet frames from one end to
the other. This replaces the kernel's netem, which some kernels lack.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import shlex
import struct
import subprocess
import threading
import time
from dataclasses import dataclass

_TUNSETIFF = 0x400454CA
_IFF_TAP_WITHOUT_HEADER = 0x0002 | 0x1000
_FRAME_BYTES = 65536


@dataclass(frozen=True)
class Quality:
    """Delay and loss of frames."""

    delay_seconds: float = 0.0
    jitter_seconds: float = 0.0
    """Largest deviation from the delay. Frames may overtake each other."""
    loss: float = 0.0
    """Share of frames that are lost; 1: the cable is cut."""


class Cable:
    """Creates the network namespaces `home` and `far` with one address each; `close` removes them.

    Raises:
        OSError: when this process lacks the rights, or the kernel the features.
    """

    home_address = "10.77.0.1"
    far_address = "10.77.0.2"

    def __init__(self, prefix: str) -> None:
        self.home, self.far = f"{prefix}h", f"{prefix}f"
        self.quality = Quality()
        self.num_lost = 0
        self._random = random.Random(0)
        self._ends: list[int] = []
        self._closing = False
        try:
            for namespace, address in ((self.home, self.home_address), (self.far, self.far_address)):
                self._ends.append(_plug(namespace, address))
        except BaseException:
            self._remove()
            raise
        self._thread = threading.Thread(target=self._carry, name="cable", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Remove the namespaces. The processes inside must have ended."""
        self._closing = True
        self._thread.join()
        self._remove()

    def _remove(self) -> None:
        for end in self._ends:
            os.close(end)
        for namespace in (self.home, self.far):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)

    def _carry(self) -> None:
        other = dict(zip(self._ends, reversed(self._ends), strict=True))
        in_flight: list[tuple[float, int, int, bytes]] = []
        number = 0
        while not self._closing:
            wait = min(0.1, in_flight[0][0] - time.monotonic()) if in_flight else 0.1
            readable, _, _ = select.select(self._ends, [], [], max(0.0, wait))
            now, quality = time.monotonic(), self.quality
            for end in readable:
                frame = os.read(end, _FRAME_BYTES)
                if self._random.random() < quality.loss:
                    self.num_lost += 1
                    continue
                delay = quality.delay_seconds + self._random.uniform(-1, 1) * quality.jitter_seconds
                number += 1
                heapq.heappush(in_flight, (now + max(0.0, delay), number, other[end], frame))
            while in_flight and in_flight[0][0] <= now:
                _, _, end, frame = heapq.heappop(in_flight)
                os.write(end, frame)


def _plug(namespace: str, address: str) -> int:
    """Creates a namespace with a TAP interface that has `address` and is up; returns its file descriptor."""
    shell(f"ip netns add {namespace}")
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", namespace.encode(), _IFF_TAP_WITHOUT_HEADER))
        shell(f"ip link set {namespace} netns {namespace}")
        shell(f"ip -n {namespace} addr add {address}/24 dev {namespace}")
        shell(f"ip -n {namespace} link set {namespace} up")
        shell(f"ip -n {namespace} link set lo up")
    except BaseException:
        os.close(end)
        raise
    return end


def shell(command: str) -> None:
    """Run a command.

    Raises:
        OSError: when the command does not exist, or fails; the text has its error output.
    """
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command}: {done.stderr.strip()}")
