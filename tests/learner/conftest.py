"""One thread, one rank, and models of a few thousand parameters for every test of the learner."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.learner.samples import save_tiny_model

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def _process_group() -> Iterator[None]:
    from learner.engine import init_distributed, shut_down_distributed

    init_distributed(torch.device("cpu"))
    yield
    shut_down_distributed()


@pytest.fixture(scope="module")
def one_rank(_process_group: None) -> Iterator[None]:
    """This process is rank 0 of 1. Its variables go when the module is done, so that no child process inherits them."""
    os.environ.update(zip(RANK_VARIABLES, ("0", "1", "0", "127.0.0.1", "0"), strict=True))
    yield
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: two layers, two heads that share one key head, tied embeddings, character tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("model"), heads=2, key_value_heads=1)
