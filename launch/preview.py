"""Notices before a run, and the tables that `--check` prints instead of starting it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from buffer.machine import THREADS_VARIABLE, available_memory_bytes
from buffer.weights.shared_memory import max_segments
from launch.config.checks import nearest_folder
from launch.config.compose import renamed_notices
from launch.config.consistency import has_critic
from launch.config.curriculum import fewest_prompts
from launch.config.model import num_parameters
from launch.config.plan import RunPlan
from launch.processes.shared_memory import NUMBER_BYTES, free_bytes
from launch.processes.topology import processes

TRAINING_BYTES = 16
"""Per trained parameter: weight, gradient and AdamW's two moments; with bfloat16 also a float32 weight."""
STATE_BYTES = 12
"""Per trained parameter in a checkpoint: AdamW's two moments and the parameter itself, in float32."""


def notices(plan: RunPlan) -> list[str]:
    """One sentence for each setting that is allowed but probably a mistake, or has an old name."""
    groups, prompts = plan.sections["groups_per_batch"], fewest_prompts(plan.stages, plan.task.levels)
    what = "a stage of the curriculum" if plan.stages else "the task"
    found = renamed_notices(plan.sections.get("overrides") or [])
    if prompts < groups:
        found.append(
            f"note: {what} has {prompts} training prompts, fewer than groups_per_batch={groups}, so every batch repeats"
            " prompts"
        )
    turns, length = plan.task.max_turns, plan.sections["max_new_tokens"]
    context = plan.sections["model"]["max_tokens"]
    if plan.task.is_multi_turn and turns * length >= context:
        found.append(
            f"note: task.max_turns={turns} turns of max_new_tokens={length} do not fit in model.max_tokens={context};"
            " an episode ends as truncated where there is no room for another turn"
        )
    if plan.cluster.relays and not plan.cluster.reaches_other_hosts:
        found.append(
            f"note: cluster.relays run on other hosts, which cannot reach cluster.host={plan.cluster.host}; set"
            " cluster.host to an address of this machine that they can reach"
        )
    return found


def print_preview(plan: RunPlan, console: Console) -> None:
    """Print tables of the run's processes, of its batches, and of the memory and disk it needs."""
    how = "continues" if plan.resumed else "would start"
    console.print(f"{how}: {plan.run_dir}", soft_wrap=True, markup=False, highlight=False)
    for title, rows in (
        ("processes", _processes(plan)),
        ("batches", _batches(plan)),
        ("memory and disk, estimated", _sizes(plan)),
    ):
        table = Table(title=title, title_justify="left", show_header=False)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for notice in notices(plan):
        console.print(notice, style="yellow", soft_wrap=True, markup=False, highlight=False)


def _processes(plan: RunPlan) -> list[tuple[str, ...]]:
    cores = {"actor": plan.cores.actors, "learner": plan.cores.learner}
    return [
        (
            spec.name,
            _counted(int(spec.environment.get(THREADS_VARIABLE, 1)), "thread"),
            f"cores {','.join(map(str, cores[spec.role]))}" if cores.get(spec.role) else "any core",
            f"devices {spec.environment.get('CUDA_VISIBLE_DEVICES', 'all')}" if plan.cluster.separate_devices else "",
        )
        for spec in processes(plan)
    ]


def _batches(plan: RunPlan) -> list[tuple[str, ...]]:
    top, learner, buffer = plan.sections, plan.sections["learner"], plan.sections["buffer"]
    groups, samples, updates = top["groups_per_batch"], top["samples_per_group"], top["updates_per_batch"]
    batches, prompts = int(buffer["num_batches"]), len(plan.task.train)
    each, every = groups * samples, learner["evaluate_every"]
    evaluations = 2 + (math.ceil(top["total_steps"] / every) - 1 if every else 0)
    held_out = min(len(plan.task.held_out), plan.sections["actor"]["evaluation_prompts"])
    return [
        ("prompts", f"{prompts:,} to train on, {len(plan.task.held_out):,} held out"),
        ("a batch", f"{groups:,} prompts x {samples} completions = {each:,}"),
        ("a completion", f"at most {top['max_new_tokens']:,} tokens"),
        ("updates", f"{updates} per batch, of {each // updates:,} completions each"),
        ("the run", f"{top['total_steps']:,} versions = {batches:,} batches = {batches * groups:,} prompts"),
        ("epochs", f"{batches * groups / prompts:.2f}"),
        ("staleness", _staleness(top["max_staleness"], updates)),
        ("evaluations", f"{evaluations}, of {held_out:,} prompts each"),
    ]


def _staleness(bound: int, updates: int) -> str:
    last = f", {bound + updates - 1} at the last update" if updates > 1 else ""
    return f"at most {bound} versions when a batch is handed out{last}" if bound else "none: strictly in turn"


def _sizes(plan: RunPlan) -> list[tuple[str, ...]]:
    """Sizes computed from the number of parameters; activations and the memory of libraries come on top."""
    parameters = _num_parameters(plan)
    model, learner, actor, weights = (plan.sections[name] for name in ("model", "learner", "actor", "weights"))
    trained = 0 if (learner.get("lora") or {}).get("rank") else parameters
    frozen = 0 if trained else parameters * NUMBER_BYTES[model["dtype"]]
    critic = parameters * TRAINING_BYTES if has_critic(plan.sections) else 0
    published = parameters * NUMBER_BYTES[learner["publish_dtype"]]
    versions = max_segments(weights["keep_versions"])
    states = trained + (parameters if critic else 0)
    checkpoint = states * STATE_BYTES + parameters * NUMBER_BYTES[model["dtype"]]
    training = _size(trained * TRAINING_BYTES + frozen + critic)
    disk = _size(shutil.disk_usage(nearest_folder(plan.run_dir)).free)
    return [
        ("parameters", f"{parameters:,}, {model['dtype']} in the learner, {actor['dtype']} in the actors"),
        ("learner", f"{training} over {_counted(learner['num_ranks'], 'rank')}"),
        ("each actor", f"{_size(parameters * NUMBER_BYTES[actor['dtype']])} of weights, and its key-value cache"),
        ("published versions", f"up to {versions} x {_size(published)}"),
        ("checkpoints", f"{learner['keep_checkpoints']} x {_size(checkpoint)} on disk"),
        ("free here", f"{_size(available_memory_bytes())} of memory, {_size(free_bytes())} shared, {disk} on disk"),
    ]


def _num_parameters(plan: RunPlan) -> int:
    embedded = plan.embedded
    if embedded is None:
        return num_parameters(Path(plan.sections["model"]["path"]))
    size, wide = embedded.hidden_size, embedded.intermediate_size
    vocabulary = len(plan.task.alphabet) if embedded.tokenizer == "characters" else embedded.vocabulary
    # Attention and feed-forward weights of every layer, and the embedding, which is also the head.
    return embedded.num_layers * (4 * size * size + 3 * size * wide) + vocabulary * size


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _size(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"
