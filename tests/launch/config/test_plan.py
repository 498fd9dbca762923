"""Every mistake a user can make ends in one sentence and exit status 2, and every file in configs/ is usable."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from buffer.config import load_run_config
from launch.cluster import main
from launch.config.compose import CONFIG_DIR, GROUPS, compose_config
from launch.config.plan import claim_default_run_dir, plan_run, write_config
from launch.config.sections import KNOWN
from launch.preview import notices

ROOT = Path(__file__).parents[3]
MATH = ("task=math", "model=small_bpe", "max_new_tokens=100", "task.num_held_out=1")
OPTIONS = [f"{group}={path.stem}" for group in GROUPS for path in sorted((CONFIG_DIR / group).glob("*.yaml"))]


def refusal(*overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        plan_run(overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence.split()) > 4
    return sentence


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("max_stalenes=1", ["max_stalenes is not a known setting", "did you mean max_staleness?"]),
        ("foo=1", ["foo is not a known setting", "total_steps", "learner"]),
        ("+foo=1", ["foo is not a known setting"]),
        ("++foo.bar=1", ["foo is not a known setting"]),
        ("hydra.run.dir=x", ["hydra is not a known setting"]),
        ("choices.task=x", ["choices is not a known setting"]),
        ("learner.zero_stag=1", ["learner.zero_stag is not a known", "did you mean learner.zero_stage?"]),
        ("+learner.qqq=1", ["learner.qqq is not a known setting", "zero_stage"]),
        ("learner.optimizer.lerning_rate=1", ["learner.optimizer.lerning_rate is not a known", "learning_rate"]),
        ("+actor.new=1", ["actor.new is not a known setting"]),
        ("+buffer.new=1", ["buffer.new is not a known setting"]),
        ("+verifier.new=1", ["verifier.new is not a known setting"]),
        ("+cluster.new=1", ["cluster.new is not a known setting"]),
        ("+task.new=1", ["task.new is not a known setting"]),
        ("+model.new=1", ["model.new is not a known setting"]),
        ("+data.new=1", ["data.new is not a known setting"]),
        ("+embedded.new=1", ["embedded.new is not a known setting"]),
        ("+pretraining.new=1", ["pretraining.new is not a known setting"]),
        ("algorithm.clip_lo=0.1", ["algorithm.clip_lo is not a known", "algorithm.clip_low"]),
        ("+correction.new=1", ["correction.new is not a known setting", "max_importance_weight"]),
        ("algorithm.correction.x=1", ["algorithm.correction", "set correction.NAME=VALUE"]),
        ("+task.options.new=1", ["task.options.new", "arithmetic"]),
        ("algorithm=ppoo", ["algorithm=ppoo does not exist", "grpo, ", "did you mean algorithm=ppo?"]),
        ("experiment=bogus", ["experiment=bogus does not exist", "simplerl_zero"]),
        ("algorithm=null", ["algorithm=null"]),
        ("algorithm=ppo,grpo", ["algorithm=ppo,grpo"]),
        ("nonsense", ["'nonsense' is not of the form key=value"]),
        ("total_steps=[1", ["total_steps=[1"]),
        ("~learner", ["~learner would remove"]),
        ("actor=5", ["actor"]),
        ("cluster=local2", ["cluster=local2 does not exist", "local"]),
    ],
)
def test_a_setting_or_option_that_does_not_exist_is_named(override: str, expected: list[str]):
    sentence = refusal(override)
    assert [text for text in expected if text not in sentence] == [], sentence


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["max_staleness=-1"], ["max_staleness=-1", "use 0"]),
        (["max_staleness=abc"], ["max_staleness is not valid", "'abc'"]),
        (["max_staleness=null"], ["max_staleness has no value"]),
        (["total_steps=1.5"], ["total_steps is not valid", "1.5"]),
        (["total_steps=0"], ["total_steps=0", "at least 1"]),
        (["groups_per_batch=9", "learner.num_ranks=2"], ["groups_per_batch=9", "num_ranks=2", "a multiple of 2"]),
        (
            ["groups_per_batch=16", "updates_per_batch=3", "max_staleness=3"],
            ["groups_per_batch=16", "updates_per_batch=3"],
        ),
        (["updates_per_batch=4", "max_staleness=1", "total_steps=4"], ["max_staleness 1", "to 4 or more"]),
        (["max_new_tokens=256", "model.max_tokens=256"], ["max_new_tokens=256", "256 tokens", "lower it"]),
        (["mode=bogus"], ["mode=bogus", "async or sync"]),
        (["algorithm=grpo", "samples_per_group=1"], ["samples_per_group=1", "GRPO", "2 or more"]),
        (["algorithm=dapo", "samples_per_group=1"], ["samples_per_group=1", "buffer.drop_no_signal=true", "2 or more"]),
        (["algorithm.kl=loss"], ["kl=loss", "kl_coef=0.0", "above 0"]),
        (["algorithm.kl=bogus"], ["'bogus'", "'reward'"]),
        (["algorithm.gamma=2"], ["gamma=2", "[0, 1]"]),
        (["algorithm=grpo", "correction=vtrace"], ["GRPO has no critic", "VTrace", "algorithm=ppo"]),
        (["algorithm=gspo", "correction=ppo_behavior"], ["GSPO", "0.0003", "correction=decoupled_tis"]),
        (["algorithm._target_=os.system"], ["os.system"]),
        (["reward=[{name: bogus}]"], ["unknown reward 'bogus'", "boxed_exact"]),
        (["reward=[{name: boxed_exact, wieght: 2}]"], ["reward.0.wieght is not a known setting"]),
        (["reward=[{weight: 2}]"], ["reward.0.name is missing"]),
        (["reward=[{name: none.py:mine}]"], ["none.py does not exist"]),
        (["reward=accuracy"], ["reward=accuracy is no list of rewards"]),
        (["reward=[]"], ["reward names no grader", "accuracy"]),
        (["reward=null"], ["reward has no value"]),
        (["task.name=bogus"], ["task.name 'bogus'", "countdown"]),
        (["task.template=bogus"], ["task.template 'bogus'", "plain"]),
        (["task.num_held_out=0"], ["task.num_held_out=0", "1 or more"]),
        (["task=sokoban", "reward=[{name: boxed_exact}]"], ["boxed_exact", "multi-turn", "leave it empty"]),
        (["task=sokoban", "task.template=plain"], ["'plain'", "between two turns", "use turns or qwen_turns"]),
        (["task=sokoban", "task.max_turns=2"], ["task.options.depth is 5", "task.max_turns=2", "raise one"]),
        (["task.max_turns=2"], ["task.max_turns is 2", "arithmetic", "one turn"]),
        (["temperature=0"], ["temperature=0", "above 0"]),
        (["seed=x"], ["seed is not valid"]),
        (["learner.zero_stage=4"], ["learner.zero_stage=4", "0, 1, 2 or 3"]),
        (["model.dtype=float16"], ["model.dtype=float16", "bfloat16"]),
        (["embedded.hidden_size=96", "embedded.num_heads=5"], ["embedded.hidden_size=96", "num_heads=5"]),
        (["embedded.tokenizer=words"], ["embedded.tokenizer=words", "bpe"]),
        (["pretraining.num_threads=0"], ["pretraining.num_threads=0"]),
        (["pretraining.error_rate=2"], ["pretraining.error_rate=2.0"]),
        (["buffer.durability=bogus"], ["buffer.durability", "'bogus'", "full"]),
        (["cluster.num_actors=0"], ["cluster.num_actors=0"]),
        (["cluster.learner_cores=0"], ["cluster.learner_cores=0"]),
        (['cluster.relays=[""]'], ["cluster.relays", "an entry is empty", "ssh -tt"]),
        (['cluster.relays=["ssh \'node"]'], ["cluster.relays", "ssh 'node", "quotation"]),
        (["actor.tensor_parallel_size=3"], ["actor.tensor_parallel_size=3", "2 attention heads"]),
        (["cluster.max_restarts=-1"], ["cluster.max_restarts=-1"]),
        (["cluster.buffer_port=99999"], ["cluster.buffer_port=99999", "65535"]),
        (["cluster.buffer_port=7777", "cluster.weights_port=7777"], ["7777", "must differ"]),
        (["cluster.host=nowhere"], ["cluster.host=nowhere", "is no IPv4 address"]),
        (["cluster.host=0.0.0.0"], ["cluster.host=0.0.0.0", "one address of this machine"]),
        (["cluster.host=203.0.113.9"], ["cluster.host=203.0.113.9", "is no address of this machine"]),
        (["cluster.encryption=tls"], ["cluster.encryption=tls", "curve or none"]),
        (["cluster.encryption=none", "cluster.host=10.0.0.1"], ["cluster.encryption=none", "10.0.0.1", "use curve"]),
        (["actor.evaluation_prompts=0"], ["actor.evaluation_prompts=0"]),
        (["learner.tokens_per_microbatch=-5"], ["learner.tokens_per_microbatch=-5 must be at least 1"]),
        (["learner.checkpoint_every=0"], ["learner.checkpoint_every=0 must be at least 1"]),
        (["learner.evaluate_every=-3"], ["learner.evaluate_every=-3 must be at least 0"]),
        (["learner.critic_warmup_steps=-1"], ["learner.critic_warmup_steps=-1 must be at least 0"]),
        (["learner.logprob_tolerance=-1"], ["learner.logprob_tolerance=-1.0 must be above 0"]),
        (["learner.logprob_tolerance=nan"], ["learner.logprob_tolerance=nan must be above 0"]),
        (["learner.evaluation_timeout_seconds=-1"], ["learner.evaluation_timeout_seconds=-1.0 must be above 0"]),
        (["learner.optimizer.betas=[2,3]"], ["betas=[2.0, 3.0] must each be 0 or above and below 1"]),
        (["learner.optimizer.eps=0"], ["eps=0.0 must be above 0"]),
        (["learner.optimizer.weight_decay=-1"], ["weight_decay=-1.0 must be 0 (none) or above"]),
        (["learner.optimizer.learning_rate=nan"], ["learning_rate=nan must be above 0"]),
        (["total_steps=0"], ["total_steps=0 must be at least 1"]),
        (["groups_per_batch=0"], ["groups_per_batch=0 must be at least 1"]),
        (["max_new_tokens=0"], ["max_new_tokens=0 must be at least 1"]),
        (["seed=-1"], ["seed=-1 is below 0"]),
        (["temperature=inf"], ["temperature=inf must be above 0 and finite"]),
        (["model.max_tokens=1"], ["model.max_tokens=1 must be at least 2"]),
        (["model.max_tokens=auto"], ["model.max_tokens"]),
        (["actor.kv_cache_gib=0"], ["actor.kv_cache_gib=0.0 must be above 0"]),
        (["actor.gpu_memory_utilization=1.5"], ["actor.gpu_memory_utilization=1.5", "at most 1"]),
        (["actor.dtype=int8"], ["actor.dtype=int8,", "is unknown", "bfloat16"]),
        (["actor.evaluation_max_new_tokens=256"], ["actor.evaluation_max_new_tokens=256", "256 tokens"]),
        (["actor.heartbeat_seconds=0"], ["actor.heartbeat_seconds=0.0 must be above 0"]),
        (["embedded.num_heads=0"], ["embedded.num_heads=0 must be at least 1"]),
        (["pretraining.learning_rate=0"], ["pretraining.learning_rate=0.0 must be above 0"]),
        (["cluster.hung_seconds=nan"], ["cluster.hung_seconds=nan"]),
        (["weights.bytes_per_second=nan"], ["weights.bytes_per_second=nan"]),
        (["actor.evaluation_temperature=-1"], ["actor.evaluation_temperature=-1"]),
        (["cluster.min_free_bytes=1000000000000000"], ["MB free", "cluster.min_free_bytes", "choose another"]),
        (["cluster.cache_dir=/dev/null/cache"], ["cluster.cache_dir=/dev/null/cache cannot be written"]),
    ],
)
def test_a_value_that_cannot_work_is_named_with_the_way_out(make_plan: Any, overrides: list[str], expected: list[str]):
    with pytest.raises(ValueError) as caught:
        make_plan(*overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert [text for text in expected if text not in sentence] == [], sentence


def test_a_model_folder_is_looked_at_before_anything_loads_it(model_folder: Path, data_file: Path, make_plan: Any):
    overrides = ("experiment=simplerl_zero", f"data.path={data_file}", "task.num_held_out=1")
    assert "model.path is missing; give a Hugging Face folder" in refusal(*overrides)
    absent = refusal(*overrides, f"model.path={model_folder}/absent")
    assert "absent/config.json does not exist" in absent
    given = (*overrides, f"model.path={model_folder}")
    assert "model.max_tokens=4096 is beyond the context of 512 tokens" in refusal(*given)
    windows = {"max_position_embeddings": 8192, "sliding_window": 1024}
    (model_folder / "config.json").write_text(json.dumps(windows))
    assert "model.max_tokens=4096 is beyond the sliding window of 1024 tokens" in refusal(*given)
    (model_folder / "config.json").write_text(json.dumps(windows | {"use_sliding_window": False}))
    assert make_plan(*given).sections["model"]["max_tokens"] == 4096
    assert "max_new_tokens=3000" in refusal(*given, "model.max_tokens=512")
    (model_folder / "model.safetensors").unlink()
    assert "has no weights" in refusal(*given)
    (model_folder / "model.safetensors").touch()
    (model_folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in refusal(*given)
    (model_folder / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(*given)
    (model_folder / "config.json").write_text("[]")
    assert "holds no JSON object" in refusal(*given)


def test_the_seed_recipe_plans_with_a_model_and_data_of_ones_own(make_plan: Any, model_folder: Path, data_file: Path):
    limits = ("model.max_tokens=512", "max_new_tokens=400", "task.num_held_out=1")
    plan = make_plan(
        "experiment=simplerl_zero", f"data.path={data_file}", f"model.path={model_folder}", *limits, "total_steps=64"
    )
    assert plan.embedded is None
    assert plan.sections["actor"]["model_path"] == str(model_folder)
    assert (len(plan.task.train), len(plan.task.held_out)) == (2, 1)
    assert plan.sections["buffer"]["num_batches"] == 1


@pytest.mark.parametrize("override", ["data.path=x.jsonl", "data.eval_path=x.jsonl"])
def test_data_that_nobody_would_read_is_refused(override: str):
    for task in ("arithmetic", "countdown"):
        # Countdown can read puzzles, but needs some to train on.
        if (task, override) != ("countdown", "data.path=x.jsonl"):
            assert f"would not be read: task.name={task} generates its problems" in refusal(f"task={task}", override)


def test_data_is_refused_by_file_and_line(data_file: Path, tmp_path: Path):
    assert "task.data_path is empty" in refusal(*MATH)
    assert f"{tmp_path}/absent.jsonl does not exist" in refusal(*MATH, f"data.path={tmp_path}/absent.jsonl")
    data_file.write_text(data_file.read_text() + '{"problem": "What is 4 + 1?", "solution": "5"}\n')
    sentence = refusal(*MATH, f"data.path={data_file}")
    assert f"{data_file}" in sentence
    assert "line 5" in sentence
    assert "answer" in sentence


@pytest.mark.parametrize("name", ["buffer_port", "weights_port", "tensorboard_port"])
def test_a_port_in_use_is_refused(name: str, run_dir: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sentence = refusal(f"cluster.{name}={port}", "cluster.tensorboard=true", f"run_dir={run_dir}")
    assert f"cluster.{name}={port} is in use on this machine" in sentence


def test_a_free_port_is_taken_as_asked(make_plan: Any):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    plan = make_plan(f"cluster.buffer_port={port}")
    assert plan.sections["buffer"]["address"] == f"tcp://127.0.0.1:{port}"
    assert plan.sections["weights"]["address"] != plan.sections["buffer"]["address"]


def test_both_servers_listen_where_the_host_says(make_plan: Any):
    sections = make_plan("cluster.host=127.0.0.2").sections
    assert [sections[name]["address"].rpartition(":")[0] for name in ("buffer", "weights")] == ["tcp://127.0.0.2"] * 2


def test_a_run_directory_that_cannot_be_written_is_refused():
    assert "run_dir=/dev/null/run cannot be written: Not a directory" in refusal("run_dir=/dev/null/run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_run_directory_without_permission_is_refused(tmp_path: Path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "cannot be written: Permission denied" in refusal(f"run_dir={locked}/run")


def test_runs_that_start_in_the_same_second_get_different_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.config.plan.time.strftime", lambda _: "20250101-120000")
    name = "20250101-120000-arithmetic-ppo"
    # All are planned before the first directory exists.
    plans = [plan_run([]) for _ in range(3)]
    assert not (tmp_path / "runs").exists()
    claimed = [claim_default_run_dir(plan) for plan in plans]
    assert [plan.run_dir.name for plan in claimed] == [name, f"{name}-2", f"{name}-3"]
    for plan in claimed:
        assert plan.run_dir.is_dir()
        assert plan.sections["run_dir"] == plan.sections["buffer"]["run_dir"] == str(plan.run_dir)
    write_config(claimed[0])
    assert claim_default_run_dir(plan_run([])).run_dir.name == f"{name}-4"


def test_a_given_run_directory_keeps_its_name(make_plan: Any, run_dir: Path):
    run_dir.mkdir()
    plan = make_plan()
    assert claim_default_run_dir(plan) is plan


def test_a_run_directory_is_used_once_and_resumed_as_it_was(make_plan: Any, run_dir: Path, model_folder: Path):
    plan = make_plan("total_steps=30", "seed=7", f"model.path={model_folder}")
    write_config(plan)
    taken = refusal(f"run_dir={run_dir}")
    assert f"holds a run already; continue it with resume={run_dir}" in taken
    resumed = plan_run([f"resume={run_dir}"])
    assert resumed.resumed
    addresses = ("buffer", "weights")
    for name in (*addresses, "actor", "learner", "task", "algorithm"):
        before, after = plan.sections[name], resumed.sections[name]
        assert {key: after[key] for key in before if key != "address"} == {
            key: before[key] for key in before if key != "address"
        }


def test_an_episode_that_hardly_fits_in_the_context_is_worth_a_note(make_plan: Any):
    assert notices(make_plan("task=sokoban")) == []
    (note,) = notices(make_plan("task=sokoban", "task.max_turns=9", "max_new_tokens=36"))
    assert "task.max_turns=9 turns of max_new_tokens=36 do not fit in model.max_tokens=320" in note


def test_a_run_finds_its_files_from_any_folder(
    make_plan: Any, run_dir: Path, tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "mine.txt").write_text("{question}")
    monkeypatch.chdir(data_file.parent)
    files = [f"{key}={data_file.name}" for key in ("data.path", "data.eval_path")]
    write_config(make_plan(*MATH, *files, "task.template=mine.txt"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = plan_run([f"resume={run_dir}"])
    assert resumed.task_config.data_path == resumed.task_config.eval_path == str(data_file)
    assert resumed.task_config.template == str(tmp_path / "mine.txt")
    (tmp_path / "elsewhere" / "plain").touch()
    assert plan_run([f"run_dir={tmp_path}/other"]).task_config.template == "plain"


def test_resume_wants_a_run_whose_data_is_still_there(make_plan: Any, run_dir: Path, tmp_path: Path, data_file: Path):
    assert f"{tmp_path}/config.yaml does not exist" in refusal(f"resume={tmp_path}")
    write_config(make_plan(*MATH, f"data.path={data_file}"))
    data_file.write_text(data_file.read_text().replace("What", "Tell me what"))
    assert "data changed since the run was started" in refusal(f"resume={run_dir}")
    (run_dir / "config.yaml").write_text("seed: 3\n")
    assert "has no value" in refusal(f"resume={run_dir}")
    (run_dir / "config.yaml").write_text("- seed\n")
    assert "holds no mapping" in refusal(f"resume={run_dir}")


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.startswith(("algorithm=", "correction="))])
def test_a_run_from_before_the_modules_moved_resumes(make_plan: Any, run_dir: Path, option: str):
    """Its config.yaml names every class by a module directly in `learner`."""
    plan = make_plan(option, *(["algorithm=grpo"] if option == "correction=topr" else []))
    write_config(plan)
    config = run_dir / "config.yaml"
    text = config.read_text()
    old = text.replace("_target_: learner.algorithms.", "_target_: learner.")
    assert old.count("_target_: learner.") == text.count("_target_: ") == 3
    assert "learner.algorithms." not in old
    config.write_text(old)
    resumed = plan_run([f"resume={run_dir}"]).sections
    for section in ("algorithm", "correction"):
        assert resumed[section] == load_run_config(run_dir)[section] == plan.sections[section]
        assert instantiate(dict(resumed[section])) == instantiate(dict(plan.sections[section]))


def test_a_run_from_before_keys_were_renamed_resumes(make_plan: Any, run_dir: Path):
    plan = make_plan("learner.optimizer.max_grad_norm=0.5", "learner.critic_optimizer.min_lr_ratio=0.3")
    write_config(plan)
    config = run_dir / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("max_grad_norm:", "clip_norm:").replace("min_lr_ratio:", "floor:"))
    assert config.read_text().count("clip_norm:") == config.read_text().count("floor:") == 2
    assert plan_run([f"resume={run_dir}"]).sections["learner"] == plan.sections["learner"]


@pytest.mark.parametrize("sign", ["", "++"])
def test_old_keys_work_for_one_release_with_a_note(make_plan: Any, sign: str):
    overrides = [f"{sign}learner.optimizer.clip_norm=0.5", f"{sign}learner.critic_optimizer.floor=0.3"]
    plan = make_plan(*overrides)
    learner = plan.sections["learner"]
    assert learner["optimizer"]["max_grad_norm"] == 0.5 and learner["critic_optimizer"]["min_lr_ratio"] == 0.3
    assert not {"clip_norm", "floor"} & (learner["optimizer"].keys() | learner["critic_optimizer"].keys())
    first, second = notices(plan)
    assert first == (
        "note: learner.optimizer.clip_norm is called learner.optimizer.max_grad_norm; the next release no longer knows"
        " learner.optimizer.clip_norm"
    )
    assert "learner.critic_optimizer.floor is called learner.critic_optimizer.min_lr_ratio" in second


def test_an_old_key_inside_a_value_works_too_and_a_typed_key_has_the_last_word(make_plan: Any):
    inside = "learner.optimizer={clip_norm:0.5}"
    assert make_plan(inside).sections["learner"]["optimizer"]["max_grad_norm"] == 0.5
    settled = make_plan(inside, "learner.optimizer.max_grad_norm=0.7").sections["learner"]["optimizer"]
    assert settled["max_grad_norm"] == 0.7 and "clip_norm" not in settled


def test_a_run_in_turn_is_never_stale_and_sampled_from_seeds(make_plan: Any):
    sections = make_plan("mode=sync").sections
    assert (sections["max_staleness"], sections["buffer"]["max_staleness"]) == (0, 0)
    assert sections["actor"]["seeded_sampling"] is True
    assert make_plan("max_staleness=5").sections["actor"]["seeded_sampling"] is False


def test_dapo_samples_dynamically_unless_told_otherwise(make_plan: Any):
    settings = ["algorithm=dapo"], ["algorithm=dapo", "buffer.drop_no_signal=false"], ["algorithm=grpo"]
    assert [make_plan(*overrides).sections["buffer"]["drop_no_signal"] for overrides in settings] == [
        True,
        False,
        False,
    ]


def test_a_setting_that_no_file_mentions_can_be_set(make_plan: Any):
    sections = make_plan("learner.optimizer.warmup_steps=5", "actor.share_files=false").sections
    assert sections["learner"]["optimizer"]["warmup_steps"] == 5
    assert sections["actor"]["share_files"] is False


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.startswith(("cluster=", "experiment="))])
def test_every_experiment_and_cluster_composes(option: str, capsys: pytest.CaptureFixture[str]):
    """Without the values that the user must set, as `--cfg job` shows it. The other groups' files are planned below."""
    assert main(["--cfg", "job", option]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert {"task", "model", "algorithm", "correction", "learner", "cluster", "buffer", "actor"} <= shown.keys()
    assert "hydra" not in shown


@pytest.mark.parametrize("option", [option for option in OPTIONS if not option.startswith(("cluster=", "weights="))])
def test_every_file_in_configs_plans(option: str, make_plan: Any, model_folder: Path, data_file: Path):
    """With a model and data where the file leaves them to the user."""
    composed, given = compose_config([option], KNOWN), []
    if composed.task.name == "data":
        records = [{"problem": f"{i}?", "question": f"{i}?", "answer": f"#### {i}"} for i in range(3)]
        data_file.write_text("".join(json.dumps(record) + "\n" for record in records))
        given += [f"data.path={data_file}", "task.num_held_out=1"]
    if OmegaConf.is_missing(composed.model, "path"):
        long = {"model_type": "qwen2", "max_position_embeddings": 1 << 17}
        (model_folder / "config.json").write_text(json.dumps(long))
        given.append(f"model.path={model_folder}")
        # A few of every level keep the test quick.
        given += ["task.num_train=50", "task.num_held_out=5"] if composed.task.get("num_train") else []
    elif composed.task.name == "data":
        given.append("max_new_tokens=100")
    if option == "correction=topr":
        # TOPR must know whether a whole completion was good, which advantages of the default's critic do not tell.
        given.append("algorithm=rloo")
    plan = make_plan(option, *given)
    assert plan.task.train
    group, name = option.split("=")
    assert plan.sections["choices"].get(group, name) == name


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["max_stalenes=1"], "max_stalenes is not a known setting; did you mean max_staleness?"),
        (["model=path", "model.path=/absent"], "/absent/config.json does not exist"),
        (["task=math", "data.path=/absent.jsonl"], "/absent.jsonl does not exist"),
    ],
)
def test_the_command_ends_with_status_2_and_one_sentence(overrides: list[str], expected: str, run_dir: Path):
    command = [sys.executable, "launch/cluster.py", *overrides, f"run_dir={run_dir}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert expected in ended.stderr
    assert ended.stdout == ""
    assert not run_dir.exists()


def test_the_buffer_knows_the_bounds_of_a_group(make_plan: Any, run_dir: Path, model_folder: Path):
    config = model_folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 77}))
    write_config(make_plan(f"model.path={model_folder}", "samples_per_group=4", "model.max_tokens=64"))
    written = load_run_config(run_dir)["buffer"]
    assert (written["vocab_size"], written["max_tokens"], written["samples_per_group"]) == (77, 64, 4)
