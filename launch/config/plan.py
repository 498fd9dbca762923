"""Turns the command line into one checked configuration, before any process starts.

Hydra composes `configs/` with the overrides. Every section becomes the frozen dataclass of the package that uses the
section, so an unknown key, a wrong type or two contradicting values end here, in one sentence. The result is written to
RUN_DIR/config.yaml, which is all that the processes read.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from actors.config import ActorConfig
from actors.tasks.task import Task, TaskConfig, load_task
from buffer.config import BufferConfig, load_run_config, read_section
from buffer.curriculum_config import Stage, write_levels
from buffer.weights.config import WeightsConfig
from launch.config.adapters import check_lora_layers, check_lora_settings, embedded_layers, folder_layers
from launch.config.checks import absolute_files, check_folder, check_rewards, check_space, free_address
from launch.config.compose import GROUPS, choices, compose_config, given_settings, run_sections, with_files
from launch.config.consistency import check_algorithm, check_consistency
from launch.config.cores import Cores, assign_cores
from launch.config.curriculum import check_curriculum
from launch.config.devices import check_devices
from launch.config.model import check_heads, embedded_name, embedded_settings, model_heads, read_model, vocabulary_size
from launch.config.resume import apply_changes, new_overrides
from launch.config.sections import KNOWN, check_setting_names, read_only, read_rewards, read_top_level, writable
from launch.config.settings import ClusterConfig, DataConfig, EmbeddedConfig, PretrainingConfig, RunConfig
from learner.config import LearnerConfig, LoraConfig
from verifier.config import VerifierConfig


@dataclass(frozen=True)
class RunPlan:
    """A checked run, ready to be written to config.yaml and started."""

    run_dir: Path
    sections: Mapping[str, Any]
    """The contents of config.yaml, read-only."""
    cluster: ClusterConfig
    cores: Cores
    task: Task
    task_config: TaskConfig
    embedded: EmbeddedConfig | None
    """None if `model.path` is set."""
    pretraining: PretrainingConfig
    stages: list[Stage]
    """Stages of the curriculum; may be empty."""
    resumed: bool = False
    has_default_run_dir: bool = False
    """Whether `run_dir` was not set, so that a taken name may be changed."""

    @property
    def model_folder(self) -> Path:
        """Folder of the model that training starts from; for an embedded model, its place in the cache."""
        return Path(self.sections["model"]["path"])


def plan_run(overrides: Sequence[str]) -> RunPlan:
    """Check everything that a user can get wrong.

    Args:
        overrides: key=value, as typed. `config=FILE.yaml` reads more of them from a file. `resume=RUN_DIR` continues a
            run; only some settings may then change. `resume=auto run_dir=DIR` continues the run in DIR, or starts it.

    Raises:
        ValueError: one sentence that says what is wrong, where, and the way out.
    """
    overrides = with_files(overrides)
    resume, run_dir = _typed(overrides, "resume"), _typed(overrides, "run_dir")
    overrides = [item for item in overrides if item.partition("=")[0] != "resume"]
    if resume is None:
        return _start(overrides)
    if resume == "auto":
        if not run_dir:
            raise ValueError("resume=auto has no run to look for; name its directory too, run_dir=DIR")
        if not (Path(run_dir).expanduser() / "config.yaml").exists():
            return _start(overrides)
        resume, run_dir = run_dir, None
    if run_dir:
        raise ValueError(f"resume={resume} and run_dir={run_dir} name two directories; leave run_dir out")
    overrides = [item for item in overrides if item.partition("=")[0] != "run_dir"]
    return _resume(Path(resume).expanduser(), overrides)


def claim_default_run_dir(plan: RunPlan) -> RunPlan:
    """Make the run directory if its name is the default one; with -2, -3, ... after the name if it is taken.

    Two runs that start in the same second have the same default name. Only one of them can make the directory.

    Returns:
        The plan with the directory that was made; any other plan as it is.

    Raises:
        ValueError: the directory cannot be made.
    """
    if not plan.has_default_run_dir:
        return plan
    names = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    for run_dir in (plan.run_dir.with_name(plan.run_dir.name + ending) for ending in names):
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"run_dir={run_dir} cannot be made: {error.strerror}; choose another") from error
        break
    sections = writable(plan.sections)
    sections["run_dir"] = sections["buffer"]["run_dir"] = str(run_dir)
    return replace(plan, run_dir=run_dir, sections=read_only(sections))


def write_config(plan: RunPlan) -> None:
    """Write RUN_DIR/config.yaml for all processes and, for a curriculum, the level of every prompt.

    The model's folder exists by then, also that of an embedded model.
    """
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    if plan.stages:
        write_levels(plan.run_dir, plan.task.levels.tolist())
    target = plan.run_dir / "config.yaml"
    partial = target.with_suffix(".partial")
    sections = writable(plan.sections)
    sections["buffer"]["vocab_size"] = vocabulary_size(plan.model_folder)
    OmegaConf.save(OmegaConf.create(sections), partial)
    partial.replace(target)


def _typed(overrides: Sequence[str], name: str) -> str | None:
    """The last value typed for a setting; None if there is none."""
    return next((item.partition("=")[2] for item in reversed(overrides) if item.partition("=")[0] == name), None)


def _compose(overrides: Sequence[str]) -> dict[str, Any]:
    composed = compose_config(overrides, KNOWN)
    sections, taken = run_sections(composed, overrides), choices(composed)
    check_setting_names(sections)
    sections["choices"] = {name: taken[name] for name in GROUPS if name in taken}
    return sections


def _resume(run_dir: Path, overrides: Sequence[str]) -> RunPlan:
    sections = load_run_config(run_dir)
    if new := new_overrides(sections, overrides):
        apply_changes(sections, new, _compose(new), run_dir)
    return _plan(sections, run_dir, resumed=True)


def _start(overrides: Sequence[str]) -> RunPlan:
    sections = _compose(overrides)
    check_consistency(sections, given_settings(overrides))
    taken = sections["choices"]
    if sections.get("embedded") and sections["model"].get("path"):
        raise ValueError(
            f"model={taken['model']} makes a small model here, but model.path={sections['model']['path']} names"
            " another; leave one of the two out"
        )
    sections["overrides"] = list(overrides)
    given = sections.get("run_dir")
    if not given:
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{taken['task']}-{taken['algorithm']}"
        return replace(_plan(sections, Path("runs") / name, resumed=False), has_default_run_dir=True)
    if (Path(given).expanduser() / "config.yaml").exists():
        raise ValueError(f"run_dir={given} holds a run already; continue it with resume={given} or choose another")
    return _plan(sections, Path(given), resumed=False)


def _plan(sections: dict[str, Any], run_dir: Path, *, resumed: bool) -> RunPlan:
    """Check all sections, and fill in what the launcher computes."""
    run_dir = run_dir.expanduser().absolute()
    run = read_top_level(sections)
    check_setting_names(sections)
    _apply_mode(sections, run.mode)
    cluster = read_section(ClusterConfig, sections["cluster"], "cluster")
    sections["task"] = absolute_files(sections["task"])
    task_config = read_section(TaskConfig, sections["task"], "task")
    pretraining = read_section(PretrainingConfig, sections.get("pretraining") or {}, "pretraining")
    read_section(VerifierConfig, sections["verifier"], "verifier")
    embedded = read_model(sections, task_config.max_turns)
    learner = read_section(LearnerConfig, sections["learner"], "learner")
    task = _read_task(sections, task_config, run)
    if resumed and sections["buffer"].get("data_fingerprint") != task.fingerprint:
        raise ValueError(
            f"resume={run_dir}: the task's data changed since the run was started; restore it or start anew"
        )
    if embedded is not None:
        settings = embedded_settings(embedded, pretraining, task, sections["model"]["max_tokens"])
        name = embedded_name(settings, pretraining, task, task_config)
        _set_model_path(sections, _cache_dir(cluster) / name, run_dir)
    actor = _read_actor(sections, embedded)
    cores = assign_cores(cluster, num_ranks=learner.num_ranks, workers_per_actor=actor.tensor_parallel_size)
    sections["learner"]["cpu_affinity"] = list(cores.learner)
    _fill_buffer(sections, run_dir, task, learner)
    _choose_addresses(sections, cluster)
    _check_weights(sections, cluster, learner, actor)
    if learner.lora.rank:
        _check_lora(sections, learner.lora, embedded)
    check_algorithm(sections, learner, read_section(BufferConfig, sections["buffer"], "buffer"))
    _check_disk(run_dir, cluster, makes_model=embedded is not None)
    return RunPlan(
        run_dir=run_dir,
        sections=read_only(sections),
        cluster=cluster,
        cores=cores,
        task=task,
        task_config=task_config,
        embedded=embedded,
        pretraining=pretraining,
        stages=run.curriculum,
        resumed=resumed,
    )


def _apply_mode(sections: dict[str, Any], mode: str) -> None:
    if mode == "sync":
        sections["max_staleness"] = sections["buffer"]["max_staleness"] = 0
    if sections["actor"].get("seeded_sampling") is None:
        sections["actor"]["seeded_sampling"] = mode == "sync"


def _read_task(sections: dict[str, Any], config: TaskConfig, run: RunConfig) -> Task:
    """Load the prompts, and check that rewards and curriculum suit them."""
    data = read_section(DataConfig, sections.get("data") or {}, "data")
    if (data.path or data.eval_path) and config.name != "data" and not config.data_path:
        raise ValueError(
            f"data.path={data.path} with data.eval_path={data.eval_path} would not be read: task.name={config.name}"
            " generates its problems; leave the two out, or set data.path for a task that reads it, such as task=math"
        )
    task = load_task(config)
    rewards = read_rewards(sections["reward"])
    check_rewards(rewards, is_multi_turn=task.is_multi_turn)
    sections["reward"] = [asdict(spec) for spec in rewards]
    check_curriculum(run, task.levels)
    if not task.held_out:
        raise ValueError("task.num_held_out=0 leaves nothing to evaluate on; set it to 1 or more")
    return task


def _set_model_path(sections: dict[str, Any], folder: Path, run_dir: Path) -> None:
    """Set model.path to the embedded model's folder. A resumed run must have the same folder already."""
    if sections["model"]["path"] not in (None, str(folder)):
        raise ValueError(
            f"resume={run_dir}: its base model {sections['model']['path']} is gone, and what is made now would be"
            " another; restore it or start anew"
        )
    sections["model"]["path"] = str(folder)


def _read_actor(sections: dict[str, Any], embedded: EmbeddedConfig | None) -> ActorConfig:
    sections["actor"]["model_path"] = sections["model"]["path"]
    actor = read_section(ActorConfig, sections["actor"], "actor")
    heads = embedded.num_heads if embedded is not None else model_heads(Path(sections["model"]["path"]))
    check_heads(heads, actor.tensor_parallel_size)
    return actor


def _fill_buffer(sections: dict[str, Any], run_dir: Path, task: Task, learner: LearnerConfig) -> None:
    sections["run_dir"] = str(run_dir)
    sections["buffer"] |= {
        "run_dir": str(run_dir),
        "num_prompts": len(task.train),
        "data_fingerprint": task.fingerprint,
        "num_batches": learner.total_steps // learner.updates_per_batch,
        "stages": sections["curriculum"],
        "max_tokens": sections["model"]["max_tokens"],
        "samples_per_group": learner.samples_per_group,
    }


def _choose_addresses(sections: dict[str, Any], cluster: ClusterConfig) -> None:
    host = cluster.host
    sections["buffer"]["address"] = free_address(cluster.buffer_port, "cluster.buffer_port", host)
    sections["weights"] |= {"address": free_address(cluster.weights_port, "cluster.weights_port", host)}
    if cluster.tensorboard:
        free_address(cluster.tensorboard_port, "cluster.tensorboard_port")


def _check_weights(
    sections: dict[str, Any], cluster: ClusterConfig, learner: LearnerConfig, actor: ActorConfig
) -> None:
    if sections["weights"].get("transport") == "nccl":
        sections["weights"]["group_size"] = 1 + cluster.num_actors * actor.tensor_parallel_size
    check_devices(read_section(WeightsConfig, sections["weights"], "weights"), cluster, learner, actor)


def _check_lora(sections: dict[str, Any], lora: LoraConfig, embedded: EmbeddedConfig | None) -> None:
    layers = folder_layers(Path(sections["model"]["path"])) if embedded is None else embedded_layers(embedded)
    check_lora_layers(lora, layers)
    check_lora_settings(lora, model_dtype=sections["model"]["dtype"], actor_dtype=sections["actor"]["dtype"])


def _check_disk(run_dir: Path, cluster: ClusterConfig, *, makes_model: bool) -> None:
    check_folder(run_dir, "run_dir")
    check_space(run_dir, "run_dir", cluster.min_free_bytes)
    if makes_model:
        check_folder(_cache_dir(cluster), "cluster.cache_dir")


def _cache_dir(cluster: ClusterConfig) -> Path:
    return Path(cluster.cache_dir).expanduser().absolute()
