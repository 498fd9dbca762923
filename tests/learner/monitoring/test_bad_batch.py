import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from buffer.transport.messages import (
    Shard,
)
from buffer.transport.packed_group import pack_group
from learner.monitoring.bad_batch import load_bad_batch, main, save_bad_batch
from tests.learner.samples import make_group

ROOT = Path(__file__).parents[3]


def saved(tmp_path: Path) -> Path:
    shard = Shard(7, 4, (0, 1), tuple(pack_group(make_group(f"{i}.0", i)) for i in range(2)))
    return save_bad_batch(
        tmp_path / "bad_batches", 1, shard, {"policy/gradient_norm": float("nan"), "reward/mean": 0.5}
    )


def test_a_saved_batch_comes_back_whole_with_its_metrics(tmp_path: Path):
    path = saved(tmp_path)
    assert path == tmp_path / "bad_batches" / "00000007-rank-1.msgpack"
    shard, groups = load_bad_batch(path)
    assert (shard.policy_version, shard.num_groups_in_batch, shard.staleness) == (7, 4, (0, 1))
    for number, group in enumerate(groups):
        for actual, expected in zip(group.trajectories, make_group(f"{number}.0", number).trajectories, strict=True):
            assert np.array_equal(actual.token_ids, expected.token_ids)
            assert np.array_equal(actual.behavior_logprobs, expected.behavior_logprobs)
    metrics = json.loads(path.with_suffix(".json").read_text())
    assert metrics["reward/mean"] == 0.5 and np.isnan(metrics["policy/gradient_norm"])


def test_it_is_printed_without_torch(tmp_path: Path):
    code = (
        "import sys; from learner.monitoring.bad_batch import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(saved(tmp_path))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert lines[0] == "batch for policy 7: 2 of its 4 groups" and lines[-1] == "False"
    assert sum(line.startswith(("0.0.", "1.0.")) for line in lines) == 8


@pytest.mark.parametrize("contents", [b"", b"\xc1", b"\x93\x01\x02\x03", b"\x91\xc4\x01a", b"\x05"])
def test_another_file_is_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], contents: bytes):
    (tmp_path / "file").write_bytes(contents)
    assert main([str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/file ")
