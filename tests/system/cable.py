"""A network cable between two network namespaces that can be slow, leaky or cut.

Each end is a TAP interface inside its namespace; a thread of this process carries the Ethernet frames across, late, or
not at all. It does what the kernel's netem does, also on kernels that are built without it.
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
    """What happens to a frame on its way."""

    delay_seconds: float = 0.0
    jitter_seconds: float = 0.0
    """The delay varies by up to this, so frames overtake each other."""
    loss: float = 0.0
    """Share of frames that never arrive; 1: the cable is cut."""


class Cable:
    """Namespaces `home` and `far`, made here and removed by `close`, with one address each.

    Raises:
        OSError: when the rights or the kernel's means are missing.
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
        """Remove everything; processes inside must have ended."""
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
        under_way: list[tuple[float, int, int, bytes]] = []
        number = 0
        while not self._closing:
            wait = min(0.1, under_way[0][0] - time.monotonic()) if under_way else 0.1
            readable, _, _ = select.select(self._ends, [], [], max(0.0, wait))
            now, quality = time.monotonic(), self.quality
            for end in readable:
                frame = os.read(end, _FRAME_BYTES)
                if self._random.random() < quality.loss:
                    self.num_lost += 1
                    continue
                delay = quality.delay_seconds + self._random.uniform(-1, 1) * quality.jitter_seconds
                number += 1
                heapq.heappush(under_way, (now + max(0.0, delay), number, other[end], frame))
            while under_way and under_way[0][0] <= now:
                _, _, end, frame = heapq.heappop(under_way)
                os.write(end, frame)


def _plug(namespace: str, address: str) -> int:
    """One end: the file descriptor of a TAP interface that lies, up and with `address`, in a new namespace."""
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
        OSError: with what it said when it failed, or when there is no such command.
    """
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command}: {done.stderr.strip()}")
