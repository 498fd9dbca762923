import subprocess
import sys

import pytest
import torch

from learner.distributed.collectives import all_reduce_max, all_reduce_sum, any_rank, barrier, rank_and_world_size
from tests.learner.samples import CPU


@pytest.mark.usefixtures("one_rank")
def test_one_rank_agrees_with_itself():
    assert rank_and_world_size() == (0, 1)
    values = torch.tensor([3.0, -1.0])
    assert all_reduce_sum(values) is values and all_reduce_max(values) is values
    assert values.tolist() == [3.0, -1.0]
    assert (any_rank(True, CPU), any_rank(False, CPU)) == (True, False)
    barrier()


def test_the_collectives_and_the_stop_conditions_need_no_deepspeed():
    program = "import sys; import learner.monitoring.stop_conditions; sys.exit('deepspeed' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
