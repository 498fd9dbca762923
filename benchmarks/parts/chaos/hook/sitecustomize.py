"""Python imports this at the start of every process of a disturbed run; it acts in the buffer only.

After every fsync of one of the ledger's files, the file is copied to the folder for images: that is what a power cut
would leave of it.
"""

from __future__ import annotations

import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any


def _record(images: Path) -> Any:
    from tests.buffer.forgetful_disk import LEDGER, ForgetfulDisk

    class Images(ForgetfulDisk):
        def add(self, kind: str, path: str | Path, *rest: Any, **more: Any) -> None:
            name = Path(path).name
            if kind == "sync" and name.startswith(LEDGER):
                partial = images / f"{name}.partial"
                shutil.copyfile(path, partial)
                partial.rename(images / name)

    recording = Images(images).recording()
    recording.__enter__()
    return recording


if ("-m", "buffer") in pairwise(sys.orig_argv):
    from benchmarks.parts.chaos.power_cut import IMAGES_VARIABLE

    # Kept, because the end of the recording would end the copies.
    _RECORDING = _record(Path(os.environ[IMAGES_VARIABLE]))
