"""`python -m buffer serve RUN_DIR` runs a run's buffer; `python -m buffer inspect RUN_DIR` checks a run's ledger.

Exit status: 0 on success; 1 when `inspect` finds a broken invariant, or on an error after serving began, after which a
restart may help; 2, with one sentence, when a restart cannot help: on a mistake that is found before serving, and when
the ledger was deleted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from buffer.config import BufferConfig, load_run_config, read_section
from buffer.ledger.audit import Audit, StageRow, audit
from buffer.ledger.ledger_file import LedgerLostError
from buffer.service.server import Server, open_server
from buffer.service.waits import SavedWaits, load_waits


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m buffer", description="The prompt ledger and replay store.")
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve", help="serve the run until SIGTERM or SIGINT")
    inspecting = commands.add_parser("inspect", help="print the ledger's counts by state and check its invariants")
    inspecting.add_argument("--json", action="store_true", help="print JSON")
    for command in (serving, inspecting):
        command.add_argument("run_dir", help="the run's directory")
    options = parser.parse_args(arguments)
    try:
        if options.command == "inspect":
            return _inspect(options.run_dir, options.json)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        server = open_server(read_buffer_config(options.run_dir))
    except ValueError as error:
        print(f"buffer: {error}", file=sys.stderr)
        return 2
    except sqlite3.DatabaseError as error:
        print(f"buffer: the ledger in {options.run_dir} cannot be used: {error}", file=sys.stderr)
        return 2
    return _run(server)


def _run(server: Server) -> int:
    try:
        server.run()
    except LedgerLostError as error:
        print(f"buffer: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        logging.getLogger("buffer").exception("the buffer cannot go on")
        # The launcher shows the log's last line, so the last line names the error.
        print(f"buffer: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def read_buffer_config(run_dir: str) -> BufferConfig:
    """Read the section `buffer` of the run's configuration, with `run_dir` as given.

    Raises:
        ValueError: when the file or the section is missing or invalid.
    """
    section: Any = load_run_config(run_dir).get("buffer")
    if not isinstance(section, dict):
        raise ValueError(f"{run_dir}/config.yaml has no section named buffer; restore the file the launcher wrote")
    return read_section(BufferConfig, {**section, "run_dir": str(run_dir)}, "buffer")


def _inspect(run_dir: str, as_json: bool) -> int:
    found, saved = audit(run_dir), load_waits(Path(run_dir))
    if as_json:
        waits = dataclasses.asdict(saved) if saved else {"waits": [], "age_seconds": None}
        print(json.dumps(dataclasses.asdict(found) | {"holds": found.holds} | waits, indent=2))
    else:
        print(_describe(found), *_describe_waits(saved), sep="\n")
    return 0 if found.holds else 1


def _describe(found: Audit) -> str:
    rows = [("issued", found.issued), *found.counts.items()]
    rows += [(f"dropped: {reason}", number) for reason, number in sorted(found.dropped.items())]
    rows += sorted(found.counters.items())
    rows += [(f"evaluations {state}", number) for state, number in sorted(found.evaluations.items())]
    rows += [("policy_version", found.policy_version), ("uses", found.uses), ("staleness_max", found.staleness_max)]
    lines = [f"{name:<24}{number:>10}" for name, number in rows]
    lines.append(f"{'staleness_mean':<24}{found.staleness_mean:>10.2f}")
    lines += [_describe_stage(stage) for stage in found.stages]
    lines += [f"broken: {problem}" for problem in found.problems]
    lines.append("the invariant holds" if found.holds else "the invariant does not hold")
    return "\n".join(lines)


def _describe_stage(row: StageRow) -> str:
    began = f"stage {row.stage} began at policy {row.policy_version} with occurrence {row.first_occurrence}"
    if row.stage > 1:
        began += f", after success {row.success_before:.2f} over {row.groups_before} groups"
    return f"{began}; epoch {row.epoch}, {row.num_passed_over} prompts passed over"


def _describe_waits(saved: SavedWaits | None) -> list[str]:
    if saved is None or not saved.waits:
        return []
    lines = [f"{wait.who} waits for {wait.for_what}, since {wait.seconds:.0f} s" for wait in saved.waits]
    return [*lines, f"waits as of {saved.age_seconds:.0f} s ago"]


if __name__ == "__main__":
    sys.exit(main())
