"""Saves a batch that stopped a run. `python -m learner.monitoring.bad_batch FILE` prints such a batch.

`RUN_DIR/bad_batches/00000041-rank-0.msgpack` holds the frames of the `Shard` message that this rank received. The
`.json` file beside it holds the metrics of the batch's last step. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgpack

from buffer.trajectory import TrajectoryGroup
from buffer.transport.messages import Shard, decode, encode
from buffer.transport.packed_group import unpack_group

SAVED = "saved batch"
"""Replaces the run's name in the encoded message."""


def save_bad_batch(directory: Path, rank: int, shard: Shard, metrics: Mapping[str, float]) -> Path:
    """Write this rank's shard of a batch and the metrics of its last step. Returns the path of the batch's file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{shard.policy_version:08d}-rank-{rank}.msgpack"
    path.write_bytes(msgpack.packb(encode(shard, 0, SAVED)))
    path.with_suffix(".json").write_text(json.dumps(dict(metrics), indent=1))
    return path


def load_bad_batch(path: Path) -> tuple[Shard, list[TrajectoryGroup]]:
    """Read what `save_bad_batch` wrote, with the checks that a received message gets.

    Raises:
        ValueError: the file is not a saved batch.
    """
    try:
        frames = msgpack.unpackb(path.read_bytes())
        shard, _ = decode(frames, SAVED) if isinstance(frames, list) else (None, 0)
        if not isinstance(shard, Shard):
            raise TypeError("it holds something else")
        return shard, [unpack_group(packed) for packed in shard.groups]
    # WireError and most errors of msgpack are ValueErrors; frames that are not bytes raise TypeError.
    except (ValueError, msgpack.UnpackException, OSError, TypeError) as error:
        raise ValueError(f"{path} is not a saved batch: {error}") from error


def describe(shard: Shard, groups: Sequence[TrajectoryGroup]) -> str:
    """Format a batch as a table with one line per trajectory."""
    lines = [f"batch for policy {shard.policy_version}: {len(groups)} of its {shard.num_groups_in_batch} groups"]
    lines.append(f"{'trajectory':<20}{'tokens':>8}{'reward':>10}{'lowest log mu':>16}  versions, verdict")
    for group in groups:
        for one in group.trajectories:
            lowest = f"{float(one.behavior_logprobs.min()):.4g}"
            versions = f"{one.oldest_version}-{one.newest_version}"
            lines.append(
                f"{one.trajectory_id:<20}{one.num_tokens:>8}{one.reward:>10.4g}{lowest:>16}  {versions}, {one.verdict}"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a saved batch. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m learner.monitoring.bad_batch", description="Print a saved batch.")
    parser.add_argument("path", type=Path, help="RUN_DIR/bad_batches/VERSION-rank-R.msgpack")
    path = parser.parse_args(arguments).path
    try:
        shard, groups = load_bad_batch(path)
        print(describe(shard, groups))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
