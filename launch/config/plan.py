"""From the command line to one checked, resolved configuration, before anything heavy starts.

Hydra composes `configs/` with the overrides; every section then becomes the frozen dataclass of the package that uses
it, so an unknown key, a wrong type or two values that contradict each other end here, in one sentence. What is resolved
is written to RUN_DIR/config.yaml, the only thing the processes read.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hydra.errors import HydraException
from omegaconf import OmegaConf

from actors.config import ActorConfig
from actors.tasks.task import Task, TaskConfig, load_task
from buffer.config import BufferConfig, load_run_config, read_section
from buffer.curriculum_config import Stage, write_levels
from buffer.weights.config import WeightsConfig
from launch.config.adapters import check_adapters, check_together, embedded_layers, folder_layers
from launch.config.checks import absolute_files, check_folder, check_space, free_address
from launch.config.compose import (
    GROUPS,
    choices,
    compose_config,
    given_settings,
    own_sections,
    unknown_setting,
    with_files,
)
from launch.config.consistency import check_consistency, target_class
from launch.config.cores import Cores, assign_cores
from launch.config.curriculum import check_curriculum, check_stage_settings
from launch.config.devices import check_devices
from launch.config.model import (
    check_context,
    check_heads,
    check_model_folder,
    embedded_name,
    embedded_settings,
    local_folder,
    model_heads,
    settle,
)
from launch.config.resume import change, new_overrides
from launch.config.rewards import check_rewards, read_rewards
from launch.config.settings import ClusterConfig, DataConfig, EmbeddedConfig, PretrainingConfig, RunConfig
from learner.config import LearnerConfig, LoraConfig, ModelConfig
from verifier.config import VerifierConfig


@dataclass(frozen=True)
class RunPlan:
    """A checked run, ready to be written down and started. Made whole by `plan_run`; nobody changes it."""

    run_dir: Path
    sections: Mapping[str, Any]
    """What goes to config.yaml, read-only."""
    cluster: ClusterConfig
    cores: Cores
    task: Task
    task_config: TaskConfig
    embedded: EmbeddedConfig | None
    """None when `model.path` is given."""
    pretraining: PretrainingConfig
    stages: list[Stage]
    """The curriculum; empty: none."""
    resumed: bool = False

    @property
    def model_folder(self) -> Path:
        """Of the model to start from; that of an embedded model lies in the cache, once it is made."""
        return Path(self.sections["model"]["path"])


SECTIONS: dict[str, type[Any]] = {
    "data": DataConfig,
    "task": TaskConfig,
    "model": ModelConfig,
    "embedded": EmbeddedConfig,
    "pretraining": PretrainingConfig,
    "learner": LearnerConfig,
    "buffer": BufferConfig,
    "actor": ActorConfig,
    "verifier": VerifierConfig,
    "weights": WeightsConfig,
    "cluster": ClusterConfig,
}
OPTIONAL = ("data", "embedded", "pretraining")
OPEN_SECTIONS = ("algorithm", "correction")
"""Their settings are those of the class in `_target_`."""
TOP_LEVEL = tuple(f.name for f in fields(RunConfig))
KNOWN = (*TOP_LEVEL, *SECTIONS, *OPEN_SECTIONS)
RECORDED = ("choices", "overrides")
"""Written for whoever resumes the run, and for a person: the files of configs/ that were taken, and what was typed."""


def plan_run(overrides: Sequence[str]) -> RunPlan:
    """Check everything a user can get wrong.

    Args:
        overrides: key=value, as typed. `config=FILE.yaml` reads more of them; `resume=RUN_DIR` continues a run, with
            the overrides that may change; `resume=auto run_dir=DIR` continues the run in DIR, or starts it.

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


def _typed(overrides: Sequence[str], name: str) -> str | None:
    """The last value that was given for a setting; None without one."""
    return next((item.partition("=")[2] for item in reversed(overrides) if item.partition("=")[0] == name), None)


def _compose(overrides: Sequence[str]) -> dict[str, Any]:
    composed = compose_config(overrides, KNOWN)
    sections, taken = own_sections(composed, overrides), choices(composed)
    _check_settings(sections)
    sections["choices"] = {name: taken[name] for name in GROUPS if name in taken}
    return sections


def _resume(run_dir: Path, overrides: Sequence[str]) -> RunPlan:
    sections = load_run_config(run_dir)
    if new := new_overrides(sections, overrides):
        change(sections, new, _compose(new), run_dir)
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
    default_name = f"{time.strftime('%Y%m%d-%H%M%S')}-{taken['task']}-{taken['algorithm']}"
    run_dir = Path(sections.get("run_dir") or Path("runs") / default_name)
    if (run_dir.expanduser() / "config.yaml").exists():
        raise ValueError(f"run_dir={run_dir} holds a run already; continue it with resume={run_dir} or choose another")
    return _plan(sections, run_dir, resumed=False)


def _plan(sections: dict[str, Any], run_dir: Path, *, resumed: bool) -> RunPlan:
    run_dir = run_dir.expanduser().absolute()
    run = _read_top(sections)
    _check_settings(sections)
    if run.mode == "sync":
        sections["max_staleness"] = sections["buffer"]["max_staleness"] = 0
    if sections["actor"].get("seeded_sampling") is None:
        sections["actor"]["seeded_sampling"] = run.mode == "sync"
    cluster = read_section(ClusterConfig, sections["cluster"], "cluster")
    sections["task"] = absolute_files(sections["task"])
    task_config = read_section(TaskConfig, sections["task"], "task")
    pretraining = read_section(PretrainingConfig, sections.get("pretraining") or {}, "pretraining")
    read_section(VerifierConfig, sections["verifier"], "verifier")
    embedded = _read_model(sections, task_config.max_turns)
    learner = read_section(LearnerConfig, sections["learner"], "learner")
    _check_data(sections, task_config)
    task = load_task(task_config)
    rewards = read_rewards(sections["reward"])
    check_rewards(rewards, is_multi_turn=task.is_multi_turn)
    sections["reward"] = [asdict(spec) for spec in rewards]
    check_curriculum(run, task.levels)
    if not task.held_out:
        raise ValueError("task.num_held_out=0 leaves nothing to evaluate on; set it to 1 or more")
    if resumed and sections["buffer"].get("data_fingerprint") != task.fingerprint:
        raise ValueError(
            f"resume={run_dir}: the task's data changed since the run was started; restore it or start anew"
        )
    if embedded is not None:
        settings = embedded_settings(embedded, pretraining, task, sections["model"]["max_tokens"])
        name = embedded_name(settings, pretraining, task, task_config)
        folder = str(Path(cluster.cache_dir).expanduser().absolute() / name)
        if sections["model"]["path"] not in (None, folder):
            raise ValueError(
                f"resume={run_dir}: its base model {sections['model']['path']} is gone, and what is made now would be"
                " another; restore it or start anew"
            )
        sections["model"]["path"] = folder
    sections["actor"]["model_path"] = sections["model"]["path"]
    actor = read_section(ActorConfig, sections["actor"], "actor")
    heads = embedded.num_heads if embedded is not None else model_heads(Path(sections["model"]["path"]))
    check_heads(heads, actor.tensor_parallel_size)
    cores = assign_cores(cluster, num_ranks=learner.num_ranks, workers_per_actor=actor.tensor_parallel_size)
    sections["learner"]["cpu_affinity"] = list(cores.learner)
    sections["run_dir"] = str(run_dir)
    sections["buffer"] |= {
        "run_dir": str(run_dir),
        "num_prompts": len(task.train),
        "data_fingerprint": task.fingerprint,
        "num_batches": learner.total_steps // learner.updates_per_batch,
        "stages": sections["curriculum"],
    }
    _choose_addresses(sections, cluster)
    _check_weights(sections, cluster, learner, actor)
    if learner.lora.rank:
        _check_lora(sections, learner.lora, embedded)
    buffer = read_section(BufferConfig, sections["buffer"], "buffer")
    _check_algorithm(sections, learner, buffer)
    check_folder(run_dir, "run_dir")
    check_space(run_dir, "run_dir", cluster.min_free_bytes)
    if embedded is not None:
        check_folder(Path(cluster.cache_dir).expanduser().absolute(), "cluster.cache_dir")
    return RunPlan(
        run_dir=run_dir,
        sections=_read_only(sections),
        cluster=cluster,
        cores=cores,
        task=task,
        task_config=task_config,
        embedded=embedded,
        pretraining=pretraining,
        stages=run.curriculum,
        resumed=resumed,
    )


def _read_only(sections: Mapping[str, Any]) -> Mapping[str, Any]:
    """The sections, and what is in them, behind views that refuse to be written to."""
    views = {name: MappingProxyType(value) if isinstance(value, dict) else value for name, value in sections.items()}
    return MappingProxyType(views)


def _read_top(sections: Mapping[str, Any]) -> RunConfig:
    """The settings at the top; refuses those and sections that nobody knows."""
    for key in sections:
        if key not in (*KNOWN, *RECORDED):
            raise unknown_setting("", key, KNOWN)
    missing = [key for key in KNOWN if key not in (*OPTIONAL, "run_dir") and sections.get(key) is None]
    if missing:
        raise ValueError(f"{missing[0]} has no value; leave it as configs/ has it, or set it")
    check_stage_settings(sections["curriculum"])
    read_rewards(sections["reward"])
    try:
        return read_section(RunConfig, {key: sections[key] for key in TOP_LEVEL if key in sections}, "")
    except ValueError as error:
        raise ValueError(str(error).removeprefix(".")) from error


def _check_settings(sections: Mapping[str, Any]) -> None:
    """Refuse unknown settings by name, before values are looked at."""
    for section, cls in SECTIONS.items():
        known, values = {f.name for f in fields(cls)}, sections.get(section) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{section}={values} is no section; set one of its settings, {section}.NAME=VALUE")
        for key in values:
            if key not in known:
                raise unknown_setting(f"{section}.", key, known)
    if sections.get("data"):
        read_section(DataConfig, sections["data"], "data")


def _check_data(sections: Mapping[str, Any], task: TaskConfig) -> None:
    data = read_section(DataConfig, sections.get("data") or {}, "data")
    if (data.path or data.eval_path) and task.name != "data" and not task.data_path:
        raise ValueError(
            f"data.path={data.path} with data.eval_path={data.eval_path} would not be read: task.name={task.name}"
            " generates its problems; leave the two out, or set data.path for a task that reads it, such as task=math"
        )


def _read_model(sections: dict[str, Any], max_turns: int) -> EmbeddedConfig | None:
    """Find the model and settle what depends on it. Returns the embedded model's settings; None for one of the user's.

    Raises:
        ValueError: no model, two of them, or one that cannot be used.
    """
    path = sections["model"].get("path")
    if path == "???" or (not path and not sections.get("embedded")):
        raise ValueError(
            "model.path is missing; give a Hugging Face folder, model.path=FOLDER, or hf:OWNER/NAME, or choose"
            " model=tiny"
        )
    # A resumed run has the folder of its embedded model in model.path; one that is gone is made again.
    if not path or (sections.get("embedded") and not (Path(path) / "config.json").is_file()):
        settle(sections, None, max_turns=max_turns)
        read_section(ModelConfig, {**sections["model"], "path": "(embedded)"}, "model")
        return read_section(EmbeddedConfig, sections["embedded"], "embedded")
    folder = local_folder(str(path))
    check_model_folder(folder)
    sections["model"]["path"] = str(folder)
    settle(sections, folder, max_turns=max_turns)
    model = read_section(ModelConfig, sections["model"], "model")
    check_context(folder, model.max_tokens)
    return None


def _check_lora(sections: dict[str, Any], lora: LoraConfig, embedded: EmbeddedConfig | None) -> None:
    layers = folder_layers(Path(sections["model"]["path"])) if embedded is None else embedded_layers(embedded)
    check_adapters(lora, layers)
    check_together(lora, model_dtype=sections["model"]["dtype"], actor_dtype=sections["actor"]["dtype"])


def _check_algorithm(sections: dict[str, Any], learner: LearnerConfig, buffer: BufferConfig) -> None:
    from hydra.utils import instantiate

    try:
        for section in OPEN_SECTIONS:
            known = inspect.signature(target_class(sections, section)).parameters
            for key in sections[section]:
                if key not in ("_target_", *known):
                    raise unknown_setting(f"{section}.", key, known)
        if sections["algorithm"].get("correction") != sections["correction"]:
            raise ValueError("algorithm.correction is taken from the section correction; set correction.NAME=VALUE")
        algorithm = instantiate(sections["algorithm"])
    except HydraException as error:
        cause = error.__cause__ or error
        raise ValueError(str(cause).splitlines()[0]) from error
    smallest = min(
        [learner.samples_per_group, *(stage.samples_per_group for stage in buffer.stages if stage.samples_per_group)]
    )
    if smallest < 2 and buffer.drop_no_signal:
        raise ValueError(
            f"samples_per_group={smallest} with buffer.drop_no_signal=true drops every group, since a completion alone"
            " differs from none; use 2 or more"
        )
    if smallest < algorithm.min_group_size:
        raise ValueError(
            f"samples_per_group={smallest} is too few for {type(algorithm).__name__}, which compares"
            f" the completions of a prompt; use {algorithm.min_group_size} or more"
        )


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


def write_config(plan: RunPlan) -> None:
    """RUN_DIR/config.yaml, as every process will read it, and beside it what a curriculum needs to know of prompts."""
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    if plan.stages:
        write_levels(plan.run_dir, plan.task.levels.tolist())
    sections = {name: dict(value) if isinstance(value, Mapping) else value for name, value in plan.sections.items()}
    target = plan.run_dir / "config.yaml"
    partial = target.with_suffix(".partial")
    OmegaConf.save(OmegaConf.create(sections), partial)
    partial.replace(target)
