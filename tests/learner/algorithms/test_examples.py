"""The worked examples of docs/algorithms.md, computed.

`python -m tests.learner.algorithms.test_examples` prints their rows.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from learner.algorithms.base import AdvantageInputs, Algorithm, LossInputs
from learner.algorithms.corrections import Distance
from tests.learner.algorithms.pairs import ALGORITHMS, CORRECTIONS, build

ROOT = Path(__file__).parents[3]
PAGE, CONTRIBUTING = ROOT / "docs" / "algorithms.md", ROOT / "CONTRIBUTING.md"
MU, PROXIMAL, PI = (
    torch.tensor(p, dtype=torch.float64).log() for p in ([0.5, 0.2, 0.4], [0.5, 0.5, 0.2], [0.65, 0.5, 0.14])
)
SEQUENCES = torch.tensor([0, 0, 1])
REWARDS = torch.tensor([1.0, 0.0], dtype=torch.float64)
VALUES = torch.full((3,), 0.5, dtype=torch.float64)


def annotated(algorithm: Algorithm) -> tuple[Tensor, Tensor | None]:
    """(advantages [3], the critic's targets [3])."""
    group = torch.zeros(2, dtype=torch.int64)
    inputs = AdvantageInputs(REWARDS, group, SEQUENCES, MU, values=VALUES, proximal_logprobs=PROXIMAL)
    outputs = algorithm.advantages(inputs)
    return outputs.advantages, outputs.returns


def row_of_algorithm(name: str) -> str:
    """Advantages and loss of the example under decoupled_tis."""
    constant = {"constant_length": 2} if "constant_length" in build_fields(name) else {}
    algorithm = build(name, "decoupled_tis", **constant)
    advantages, targets = annotated(algorithm)
    mask = torch.ones(3, dtype=torch.bool)
    weights = algorithm.token_weights(mask, SEQUENCES, num_tokens=3, num_sequences=2)
    loss = algorithm.loss(LossInputs(PI, torch.zeros(3), MU, advantages, weights, SEQUENCES, PROXIMAL)).loss
    more = f"; targets {numbers(targets)}" if targets is not None else ""
    return f"| `{name}` | {numbers(advantages)}{more} | {loss.item():.4f} |"


def build_fields(name: str) -> str:
    return (ROOT / "configs" / "algorithm" / f"{name}.yaml").read_text()


def row_of_correction(name: str) -> str:
    """Importance weights of the example's tokens, with grpo, or with ppo where the correction needs a critic."""
    algorithm = build("ppo" if name == "vtrace" else "grpo", name)
    advantages, targets = annotated(algorithm)
    distance = Distance(PROXIMAL, MU, advantages, torch.ones(3, dtype=torch.bool), SEQUENCES)
    more = f"; targets {numbers(targets)}" if targets is not None else ""
    return f"| `{name}` | {numbers(algorithm.correction.weights(distance))}{more} |"


def numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.4f}" for value in values.tolist())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_page_shows_what_the_algorithm_computes(name: str) -> None:
    assert row_of_algorithm(name) in PAGE.read_text().splitlines()


@pytest.mark.parametrize("name", CORRECTIONS)
def test_the_page_shows_what_the_correction_computes(name: str) -> None:
    assert row_of_correction(name) in PAGE.read_text().splitlines()


def test_the_algorithm_that_the_contributors_page_adds_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the two files of the page as they are. Two of the group's three tokens are of a completion of reward 1."""
    blocks = dict(re.findall(r"^```(yaml|python)\n(.*?)^```", CONTRIBUTING.read_text(), re.DOTALL | re.MULTILINE))
    module = ModuleType("learner.algorithms.opo")
    monkeypatch.setitem(sys.modules, "learner.algorithms.opo", module)
    exec(compile(blocks["python"], "learner/algorithms/opo.py", "exec"), module.__dict__)
    config = OmegaConf.create(
        {"correction": {"_target_": "learner.algorithms.corrections.DecoupledTIS"}, "algorithm": {}}
    )
    config.algorithm = OmegaConf.create(blocks["yaml"])
    advantages, _ = annotated(instantiate(config.algorithm))
    torch.testing.assert_close(advantages, torch.tensor([1 / 3, 1 / 3, -2 / 3], dtype=torch.float64))


if __name__ == "__main__":
    print("\n".join([*map(row_of_algorithm, ALGORITHMS), "", *map(row_of_correction, CORRECTIONS)]))
