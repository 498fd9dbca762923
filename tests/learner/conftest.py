"""One thread, and models of a few thousand parameters for every test of the learner."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.learner.samples import save_tiny_model


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: two layers, two heads that share one key head, tied embeddings, character tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("model"), heads=2, key_value_heads=1)
