"""The command `slipstream`, which `pip install` installs: one subcommand per entry point.

slipstream train key=value ...     start or resume a run        python launch/cluster.py
slipstream check key=value ...     print what would run         python launch/cluster.py --check
slipstream inspect RUN_DIR         print a run's ledger         python -m buffer inspect
slipstream grade --data FILE ...   grade completions of a file  python -m verifier check
slipstream install                 install tested packages      python launch/install.py --here
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand with the remaining arguments. Returns its exit status; 2 for an unknown subcommand."""
    # Make `import buffer`, `import launch`, ... work in an installed wheel, as they do in a clone.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    typed = list(sys.argv[1:] if arguments is None else arguments)
    word, rest = (typed[0], typed[1:]) if typed else ("--help", [])
    if word in ("-h", "--help"):
        print(__doc__)
        return 0
    # Import only what the subcommand needs: `install` runs before any package is installed.
    if word in ("train", "check"):
        from launch.cluster import main as train

        return train(["--check", *rest] if word == "check" else rest)
    if word == "inspect":
        from buffer.__main__ import main as ledger

        return ledger(["inspect", *rest])
    if word == "grade":
        from verifier.__main__ import main as verify

        return verify(["check", *rest])
    if word == "install":
        from launch.install import main as install

        return install(["--here", *rest])
    print(f"error: slipstream {word} is no command; use train, check, inspect, grade or install", file=sys.stderr)
    return 2
