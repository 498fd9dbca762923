"""Simulate the protocol: one seed with its trace, or many with progress."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter

from tests.buffer.simulation.simulation import SimulationError, simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.buffer.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this seed only")
    parser.add_argument("--trace", action="store_true", help="print every event of it")
    parser.add_argument("--kinds", default="", help="kinds of faults, with commas between them; by default the seed's")
    parser.add_argument("--seeds", type=int, default=200, help="run so many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--all", action="store_true", help="go on after a failing seed")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    kinds = tuple(kind.strip() for kind in options.kinds.split(",") if kind)
    if options.seed is not None:
        try:
            print(simulate(options.seed, echo=options.trace, kinds=kinds))
        except SimulationError as error:
            print(str(error).partition("\n")[0] if options.trace else error)
            return 1
        return 0
    started, faults, failed, events, seconds = time.monotonic(), Counter[str](), [], 0, 0.0
    for done in range(options.seeds):
        seed = options.first + done
        try:
            outcome = simulate(seed, kinds=kinds)
            faults += outcome.faults
            events += outcome.num_events
            seconds += outcome.virtual_seconds
        except SimulationError as error:
            failed.append(seed)
            print(str(error).partition("\n")[0] if options.all else error, flush=True)
            if not options.all:
                return 1
        if (done + 1) % 100 == 0:
            took = time.monotonic() - started
            print(f"{done + 1} of {options.seeds} seeds, {took:.0f} s, {len(failed)} failed", file=sys.stderr)
    took = time.monotonic() - started
    print(
        f"{options.seeds} seeds in {took:.1f} s: {events} events, {seconds / 3600:.1f} h of virtual time,"
        f" {faults.total()} faults {dict(faults)}; failed: {failed or 'none'}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
