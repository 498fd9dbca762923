"""Every algorithm of configs/ with every correction of configs/, and the pairs that are refused."""

from __future__ import annotations

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from learner.algorithms.base import Algorithm

CONFIGS = Path(__file__).parents[3] / "configs"
ALGORITHMS = sorted(path.stem for path in (CONFIGS / "algorithm").glob("*.yaml"))
CORRECTIONS = sorted(path.stem for path in (CONFIGS / "correction").glob("*.yaml"))
REFUSED = {
    ("ppo", "topr"): "TOPR asks whether a completion as a whole was good",
    ("gspo", "ppo_behavior"): "GSPO clips a completion's ratio",
    **{(name, "vtrace"): "has no critic whose targets VTrace could correct" for name in ALGORITHMS if name != "ppo"},
}
SENSIBLE = [(a, c) for a in ALGORITHMS for c in CORRECTIONS if (a, c) not in REFUSED]


def algorithm_section(name: str) -> DictConfig:
    """The section `algorithm` of an algorithm's file; the file may set other sections too."""
    loaded = OmegaConf.load(CONFIGS / "algorithm" / f"{name}.yaml")
    section = loaded.get("algorithm", loaded)
    assert isinstance(section, DictConfig)
    return section


def build(algorithm: str, correction: str, **changes: object) -> Algorithm:
    """The algorithm as in a run with `max_new_tokens=64`, with some settings changed."""
    config = OmegaConf.create(
        {
            "max_new_tokens": 64,
            "correction": OmegaConf.load(CONFIGS / "correction" / f"{correction}.yaml"),
            "algorithm": algorithm_section(algorithm),
        }
    )
    OmegaConf.resolve(config)
    built = instantiate(OmegaConf.merge(config.algorithm, changes))
    assert isinstance(built, Algorithm)
    return built
