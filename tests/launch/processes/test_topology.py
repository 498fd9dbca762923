"""Command lines, environments and cores of a run's processes."""

import os
import shlex
import sys
from typing import Any

import pytest

from launch.config import cores
from launch.processes.topology import ROOT, ProcessSpec, actor_join_command, processes, relay_join_command


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Simulate a machine with these cores, without a GPU, optionally with a CPU quota."""

    def be(num_cores: int, cuda: bool = False, quota: int = 1000) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num_cores)))
        monkeypatch.setattr(cores, "num_usable_cores", lambda: min(num_cores, quota))
        monkeypatch.setattr(cores, "has_cuda", lambda: cuda)

    return be


def by_name(specs: list[ProcessSpec]) -> dict[str, ProcessSpec]:
    return {spec.name: spec for spec in specs}


def laid_out(plan: Any) -> tuple[list[int], list[int]]:
    actors, learner = list(plan.cores.actors), list(plan.cores.learner)
    assert plan.sections["learner"]["cpu_affinity"] == learner
    return actors, learner


@pytest.mark.parametrize(
    ("num_cores", "overrides", "actor", "learner"),
    [
        (1, [], [], []),
        (2, [], [0], [1]),
        (8, [], [0, 1, 2, 3, 4, 5, 6], [7]),
        (2, ["learner.num_ranks=2"], [], []),
        (8, ["learner.num_ranks=2"], [0, 1, 2, 3, 4, 5], [6, 7]),
        (8, ["cluster.learner_cores=4"], [0, 1, 2, 3], [4, 5, 6, 7]),
        (8, ["cluster.pin_cores=false"], [], []),
        (2, ["cluster.num_actors=2"], [], []),
        (4, ["cluster.num_actors=3"], [0, 1, 2], [3]),
        # A learner with several threads needs a core per thread.
        (4, ["cluster.num_actors=3", "cluster.learner_cores=2"], [0, 1], [2, 3]),
    ],
)
def test_actors_and_learner_get_cores_of_their_own(
    machine: Any, make_plan: Any, num_cores: int, overrides: list[str], actor: list[int], learner: list[int]
):
    machine(num_cores)
    assert laid_out(make_plan(*overrides)) == (actor, learner)


def test_nothing_is_pinned_beside_a_gpu(machine: Any, make_plan: Any):
    machine(8, cuda=True)
    assert laid_out(make_plan()) == ([], [])


def test_the_default_run_is_a_buffer_a_learner_and_an_actor(machine: Any, make_plan: Any, run_dir: Any):
    machine(2)
    plan = make_plan()
    specs = processes(plan)
    assert [(spec.role, spec.name) for spec in specs] == [
        ("buffer", "buffer"),
        ("learner", "learner"),
        ("actor", "actor-0"),
    ]
    commands = {name: spec.command for name, spec in by_name(specs).items()}
    assert commands == {
        "buffer": (sys.executable, "-m", "buffer", "serve", str(run_dir)),
        "learner": (sys.executable, "-m", "learner", str(run_dir)),
        "actor-0": (sys.executable, "-m", "actors", str(run_dir), "--cores", "0", "--name", "actor-0"),
    }
    for spec in specs:
        assert spec.environment["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    # vLLM gains nothing from these allocator settings.
    assert [spec.name for spec in specs if "GLIBC_TUNABLES" in spec.environment] == ["learner"]


def test_every_process_has_one_thread_per_core(machine: Any, make_plan: Any):
    machine(8)
    plan = make_plan("cluster.num_actors=3", "cluster.learner_cores=2")
    threads = {spec.name: spec.environment.get("OMP_NUM_THREADS") for spec in processes(plan)}
    assert threads == {"buffer": "1", "learner": "2", "actor-0": "2", "actor-1": "2", "actor-2": "2"}


def test_more_actors_than_cores_have_one_thread_each(machine: Any, make_plan: Any):
    machine(2)
    plan = make_plan("cluster.num_actors=2")
    assert by_name(processes(plan))["actor-1"].environment["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("quota", "overrides", "actor", "learner"),
    [
        (2, [], "1", "1"),
        (1, [], "1", "1"),
        (8, [], "7", "1"),
        (8, ["cluster.num_actors=2", "cluster.learner_cores=2"], "3", "2"),
        (9, ["actor.tensor_parallel_size=2"], "4", "1"),
        # Settings for a larger machine.
        (2, ["cluster.learner_cores=16"], "1", "2"),
        (4, ["cluster.learner_cores=16", "learner.num_ranks=2"], "1", "2"),
    ],
)
def test_a_quota_limits_threads_and_pins_nobody(
    machine: Any, make_plan: Any, quota: int, overrides: list[str], actor: str, learner: str
):
    machine(64, quota=quota)
    plan = make_plan(*overrides, "cluster.tensorboard=true", "cluster.tensorboard_port=0")
    assert laid_out(plan) == ([], [])
    specs = by_name(processes(plan))
    assert not any("--cores" in spec.command for spec in specs.values())
    threads = {name: spec.environment["OMP_NUM_THREADS"] for name, spec in specs.items()}
    ones = {"buffer": "1", "tensorboard": "1"}
    assert threads == ones | {"learner": learner} | {name: actor for name in threads if name.startswith("actor")}


def test_a_quota_of_all_cores_changes_nothing(machine: Any, make_plan: Any):
    machine(8, quota=8)
    assert laid_out(make_plan()) == ([0, 1, 2, 3, 4, 5, 6], [7])


def test_actors_beside_a_gpu_have_one_thread(machine: Any, make_plan: Any):
    machine(8, cuda=True)
    assert by_name(processes(make_plan()))["actor-0"].environment["OMP_NUM_THREADS"] == "1"


def test_several_ranks_are_started_together(machine: Any, make_plan: Any, run_dir: Any):
    machine(2)
    plan = make_plan("learner.num_ranks=2")
    learner = by_name(processes(plan))["learner"]
    assert learner.command == (sys.executable, "-m", "learner.distributed.ranks", "2", str(run_dir))


def test_tensorboard_is_served_if_asked_for(machine: Any, make_plan: Any, run_dir: Any):
    machine(2)
    plan = make_plan("cluster.tensorboard=true", "cluster.tensorboard_port=0")
    assert processes(plan)[-1].command[1:] == (
        *("-m", "tensorboard.main", "--logdir", f"{run_dir}/tensorboard", "--port", "0"),
    )


def test_a_relay_is_started_behind_each_command_as_one_line(make_plan: Any, run_dir: Any):
    plan = make_plan('cluster.relays=["ssh -tt node-1","sh -c"]')
    relays = processes(plan)[-2:]
    assert [(spec.role, spec.name) for spec in relays] == [("relay", "relay-0"), ("relay", "relay-1")]
    assert [spec.command[:-1] for spec in relays] == [("ssh", "-tt", "node-1"), ("sh", "-c")]
    words = shlex.split(relays[1].command[-1])
    assert words[0] == "env"
    assert words[-6:] == [sys.executable, "-m", "actors.relay", str(run_dir), "--name", "relay-1"]


def test_a_command_line_can_be_typed_into_a_shell():
    spec = ProcessSpec("buffer", "buffer", ("python", "-m", "buffer", "serve", "/tmp/my runs/1"), {"THREADS": "2"})
    assert spec.command_line == "env THREADS=2 python -m buffer serve '/tmp/my runs/1'"


def test_another_actor_needs_no_name_and_finds_our_packages_from_any_folder(make_plan: Any, run_dir: Any):
    plan = make_plan()
    words = shlex.split(actor_join_command(plan))
    assert words[0] == "env"
    assert f"PYTHONPATH={ROOT}" in words[1].split(os.pathsep)[0]
    assert words[-4:] == [sys.executable, "-m", "actors", str(run_dir)]
    assert shlex.split(relay_join_command(plan))[-4:] == [sys.executable, "-m", "actors.relay", str(run_dir)]
