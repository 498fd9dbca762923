"""`python -m learner.distributed.ranks NUM_RANKS RUN_DIR` runs the learner's ranks and exits with their status.

torchrun starts and ends the ranks, but exits with status 1 for any failed rank. The supervisor needs the rank's own
status: it restarts the learner after a crash, and must not after a user's mistake.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

LONGEST_END_SECONDS = str(7 * 24 * 3600)
"""After SIGTERM torchrun kills a rank that has not ended by then, by default after 30 s, which may be in the middle of
the last checkpoint. Whoever sent the SIGTERM decides how long to wait."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all ranks until they end. Returns the exit status of the rank that failed first, 128 + N after signal N."""
    parser = argparse.ArgumentParser(
        prog="python -m learner.distributed.ranks", description="Start the learner's ranks."
    )
    parser.add_argument("num_ranks", type=int)
    parser.add_argument("run_dir", help="the run's folder; its config.yaml holds all settings")
    options = parser.parse_args(arguments)
    ranks = ["--standalone", "--nproc-per-node", str(options.num_ranks), "--shutdown-timeout", LONGEST_END_SECONDS]
    try:
        torchrun([*ranks, "-m", "learner", options.run_dir])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        # The exit code is negative for a rank that a signal killed.
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
