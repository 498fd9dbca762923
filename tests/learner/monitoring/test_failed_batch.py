"""What the learner's next process reports of a failure, and what it does not."""

from pathlib import Path

import pytest
import torch

from buffer.transport.connection import RequestRefused
from buffer.transport.messages import LearnerHello
from learner.monitoring.failed_batch import (
    FILE_NAME,
    forget_failed_batch,
    hello,
    load_failed_batch,
    may_be_the_batchs,
    save_failed_batch,
)
from learner.monitoring.stop_conditions import RunStoppedError


def test_the_first_failure_is_reported_until_it_is_forgotten(tmp_path: Path):
    assert load_failed_batch(tmp_path) is None
    save_failed_batch(tmp_path, 7, ["1.0", "2.0"], IndexError("index 9\nout of range"))
    save_failed_batch(tmp_path, 7, ["3.0"], RuntimeError("another rank's"))
    failed = load_failed_batch(tmp_path)
    assert failed is not None and (failed.policy_version, failed.groups) == (7, ("1.0", "2.0"))
    report = hello(4, failed)
    assert report == LearnerHello(4, 7, ("1.0", "2.0"), "IndexError: index 9 out of range", failed.failure_id)
    forget_failed_batch(tmp_path)
    forget_failed_batch(tmp_path)
    assert hello(4, load_failed_batch(tmp_path)) == LearnerHello(4)
    save_failed_batch(tmp_path, 7, ["1.0"], IndexError())
    again = load_failed_batch(tmp_path)
    assert again is not None and again.failure_id != failed.failure_id


@pytest.mark.parametrize("content", ["", "{}", '{"policy_version": 1', "[1]"])
def test_half_a_file_is_no_report(tmp_path: Path, content: str):
    (tmp_path / FILE_NAME).write_text(content)
    assert load_failed_batch(tmp_path) is None


@pytest.mark.parametrize(
    ("error", "of_one_rank", "of_several"),
    [
        (IndexError("index out of range in self"), True, True),
        (torch.OutOfMemoryError("out of memory"), True, True),
        (RuntimeError("shape mismatch"), True, False),
        (RuntimeError("Connection closed by peer"), True, False),
        (ConnectionError("closed"), False, False),
        (TimeoutError("no answer"), False, False),
        (OSError(28, "no space"), False, False),
        (RequestRefused("another learner has started since"), False, False),
        (RunStoppedError("bad steps"), False, False),
    ],
)
def test_only_an_error_of_the_batch_itself_counts(error: Exception, of_one_rank: bool, of_several: bool):
    assert may_be_the_batchs(error, 1) is of_one_rank
    assert may_be_the_batchs(error, 2) is of_several
