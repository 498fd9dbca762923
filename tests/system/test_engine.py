"""Weight updates of the real vLLM: complete, in the middle of generation, and with our model's log-probabilities."""

from __future__ import annotations

import asyncio
import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from actors.config import ActorConfig
from actors.engine.environment import prepare_environment
from actors.rollouts.episode import run_episode
from actors.rollouts.trajectories import task_prompt_ids
from actors.tasks.games import bandit
from actors.tasks.task import TaskConfig, load_task
from buffer.transport.connection import Connection, host_id
from buffer.transport.credentials import Credentials
from buffer.weights.config import WeightsConfig
from learner.monitoring.weight_probe import Comparison, compare
from learner.sft import SftSettings, train
from learner.weights.store import WeightStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from actors.engine.engine import Engine, SampledCompletion

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

PROMPT = [5, 6, 7, 8, 9]
BY_HAND = pytest.mark.skipif(
    "SLIPSTREAM_TENSOR_PARALLEL" not in os.environ, reason="set SLIPSTREAM_TENSOR_PARALLEL=1: a minute of two workers"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pairs = folder / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "1+1=", "completion": "2"}) + "\n")
    alphabet = "0123456789+=;\\boxed{}" + bandit.COMPLETION_ALPHABET
    # Two heads, so that two tensor-parallel workers can have one each.
    shape = {"hidden_size": 64, "num_heads": 2}
    train(SftSettings(pairs=str(pairs), output=str(folder / "base"), alphabet=alphabet, steps=0, **shape))
    return folder / "base"


def perturb(model: PreTrainedModel, seed: int) -> list[tuple[str, torch.Tensor]]:
    """Set every parameter to new random values; returns copies of the parameters as the learner publishes them.

    Noise is not added to the old values: with growing weights, rounding errors would grow with the number of updates.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(("norm" in name) + 0.15 * torch.randn(parameter.shape, generator=generator))
    return [(name, parameter.detach().clone()) for name, parameter in model.named_parameters()]


def logprobs_of(model: PreTrainedModel, completion: SampledCompletion, temperature: float) -> torch.Tensor:
    ids = torch.tensor([[*PROMPT, *completion.token_ids.tolist()]])
    with torch.no_grad():
        logprobs = (model(input_ids=ids).logits[0].float() / temperature).log_softmax(-1)
    return logprobs[len(PROMPT) - 1 : -1].gather(-1, ids[0, len(PROMPT) :, None])[:, 0]


async def sample(engine: Engine, request_id: str, num_samples: int, length: int) -> list[SampledCompletion]:
    return await engine.sample(
        PROMPT, num_samples=num_samples, temperature=0.7, max_new_tokens=length, request_id=request_id
    )


def assert_agree(model: PreTrainedModel, completions: Sequence[SampledCompletion]) -> None:
    for completion in completions:
        expected = logprobs_of(model, completion, 0.7)
        torch.testing.assert_close(torch.from_numpy(completion.logprobs), expected, atol=1e-4, rtol=0)


# vLLM does not close its ZeroMQ context.
@pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning")
@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=BY_HAND)])
def test_weights_arrive_whole_and_in_flight(base: Path, tmp_path: Path, num_workers: int) -> None:
    config = ActorConfig(
        model_path=str(base),
        samples_per_group=4,
        max_new_tokens=200,
        max_tokens=256,
        max_groups_in_flight=16,
        tensor_parallel_size=num_workers,
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    prepare_environment(config)
    asyncio.run(_check_updates(config, base, tmp_path))


async def _check_updates(config: ActorConfig, base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from actors.engine.engine import Engine
    from actors.weights.client import WeightClient

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    address = f"ipc://{tmp_path}/weights.ipc"
    credentials = Credentials.plain("test")
    store, connection = (
        WeightStore(tmp_path / "weights", WeightsConfig(address, keep_versions=1), credentials),
        Connection(address, "test", credentials),
    )
    engine = Engine(config)
    where = {"published": tmp_path / "weights", "chunk_bytes": 1 << 16}
    mapping, pulling = (WeightClient(connection, host_id=host, **where) for host in (host_id(), "another host"))

    async def update(version: int, named: list[tuple[str, torch.Tensor]]) -> None:
        """Publish and load a version. Odd versions are pulled, even ones mapped; their memory is reused at once."""
        manifest = await asyncio.wrap_future(store.publish(version, named))
        local = await (pulling if version % 2 else mapping).fetch(manifest)
        await engine.load(local)
        local.release()

    try:
        await engine.start()
        loaded_from_folder = await engine.checksums()
        # The transferred weights are those that vLLM loaded from the folder, parameter by parameter.
        await update(0, list(model.named_parameters()))
        assert await engine.checksums() == loaded_from_folder
        # Every later version is used for sampling, also in the output head, which is tied to the embedding.
        for version in (1, 2):
            await update(version, perturb(model, seed=version))
            completions = await sample(engine, f"fresh-{version}", 4, 40)
            assert_agree(model, completions)
            await _check_scores(engine, model, longest(completions), version)
            await _check_skipped_load(engine, model, longest(completions), version)
            assert {span.version for c in completions for span in c.versions} == {version}
        # An update in the middle of generation aborts nothing, and every token has the version that sampled it.
        running = asyncio.gather(*(sample(engine, f"long-{i}", 4, 200) for i in range(16)))
        newest = 2
        while not running.done():
            newest += 1
            await update(newest, perturb(model, seed=newest))
            await asyncio.sleep(0.1)
        completions = [completion for group in await running for completion in group]
        assert len(completions) == 64
        spanning = [c for c in completions if len(c.versions) > 1]
        assert spanning
        for completion in spanning:
            starts = [span.start for span in completion.versions]
            versions = [span.version for span in completion.versions]
            assert starts[0] == 0
            assert starts == sorted(set(starts))
            assert starts[-1] < len(completion.token_ids)
            assert versions == sorted(set(versions))
            assert 2 <= versions[0] < versions[-1] <= newest
            assert len(completion.logprobs) == len(completion.token_ids)
        assert_agree(model, await sample(engine, "after", 4, 40))
        await _check_turns(engine, base, model)
        await _check_recomputed(engine, model, update, newest + 1)
    finally:
        engine.close()
        connection.close()
        store.close()


def longest(completions: Sequence[SampledCompletion]) -> SampledCompletion:
    return max(completions, key=lambda completion: len(completion.token_ids))


async def _check_scores(engine: Engine, model: PreTrainedModel, completion: SampledCompletion, version: int) -> None:
    """Given tokens are scored as if they had been sampled, while the engine is full of other requests."""
    token_ids = [*PROMPT, *completion.token_ids[:16].tolist()]
    others = asyncio.gather(*(sample(engine, f"beside-{version}-{i}", 4, 60) for i in range(16)))
    await asyncio.sleep(0.05)
    scored = await engine.score(token_ids, len(token_ids) - len(PROMPT), 0.7, f"probe-{version}")
    assert not others.done(), "the probe waited for the rollouts"
    assert scored is not None and scored.policy_version == version
    expected = logprobs_of(model, completion, 0.7)[:16]
    torch.testing.assert_close(torch.tensor(scored.logprobs), expected, atol=1e-4, rtol=0)
    other_temperature = await engine.score(token_ids, 4, 1.0, f"probe-hot-{version}")
    assert other_temperature is not None
    assert (torch.tensor(other_temperature.logprobs) - expected[-4:]).abs().max() > 1e-3
    assert_agree(model, [completion for group in await others for completion in group])


async def _check_skipped_load(
    engine: Engine, model: PreTrainedModel, completion: SampledCompletion, version: int
) -> None:
    """An engine that names another version and keeps its weights is what the weight probe finds."""
    token_ids = [*PROMPT, *completion.token_ids[:16].tolist()]
    kept = {version: logprobs_of(model, completion, 0.7)[:16].double().numpy()}
    newer = copy.deepcopy(model)
    perturb(newer, seed=100 + version)
    kept[version + 1] = logprobs_of(newer, completion, 0.7)[:16].double().numpy()
    named: list[Comparison] = []
    for name in (version + 1, version):
        await engine._thread.call(lambda llm, name=name: llm.set_weight_version(str(name)))
        scored = await engine.score(token_ids, 16, 0.7, f"skipped-{name}")
        assert scored is not None and scored.policy_version == name
        named.append(compare(kept, name, scored.logprobs))
    skipped, right = named
    assert skipped.is_alarm(0.02) and skipped.best_version == version
    assert not right.is_alarm(0.02)


async def _check_recomputed(engine: Engine, model: PreTrainedModel, update: Any, version: int) -> None:
    """With `_recomputes` the tokens after an update are sampled as if the new version had also computed the cache."""
    engine._recomputes = True
    running = asyncio.gather(*(sample(engine, f"recomputed-{i}", 4, 200) for i in range(16)))
    await asyncio.sleep(0.1)
    await update(version, perturb(model, seed=version))
    completions = [c for group in await running for c in group if len(c.versions) > 1]
    assert completions, "the update came too late"
    for completion in completions:
        assert [span.version for span in completion.versions] == [version - 1, version]
        start = completion.versions[1].start
        found, expected = torch.from_numpy(completion.logprobs), logprobs_of(model, completion, 0.7)
        torch.testing.assert_close(found[start:], expected[start:], atol=3e-4, rtol=0)
        # Control: the tokens before the update come from other weights and differ by more.
        assert (found[:start] - expected[:start]).abs().max() > 1e-3


async def _check_turns(engine: Engine, base: Path, model: PreTrainedModel) -> None:
    """The log-probabilities of an episode's turns equal those that the model gives to the whole trajectory."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    task = load_task(TaskConfig(name="bandit", template="turns", num_train=1, max_turns=3, options={"pulls": 3}))
    prompt_ids = task_prompt_ids(task, task.train[0], tokenizer)

    async def sample_turn(token_ids: Sequence[int], turn: int) -> SampledCompletion:
        name = f"turn-{turn}"
        how = {"temperature": 0.7, "max_new_tokens": 12, "seed": turn}
        [choice] = await engine.sample(token_ids, num_samples=1, request_id=name, **how)
        return choice

    limits = {"seed": 0, "max_new_tokens": 12, "max_tokens": 256}
    completion, _ = await run_episode(task, task.train[0], prompt_ids, tokenizer, sample_turn, **limits)
    assert completion.num_turns == 3
    assert 0 < completion.num_sampled < completion.num_tokens
    ids = torch.tensor([[*prompt_ids, *completion.token_ids]])
    with torch.no_grad():
        expected = (model(input_ids=ids).logits[0].float() / 0.7).log_softmax(-1)
    expected = expected[len(prompt_ids) - 1 : -1].gather(-1, ids[0, len(prompt_ids) :, None])[:, 0]
    mask = torch.tensor(completion.loss_mask)
    torch.testing.assert_close(torch.tensor(completion.logprobs)[mask], expected[mask], atol=1e-4, rtol=0)
