"""The registry and the scorer: the sum of rewards, rejected configurations, and rewards in a user's file."""

import asyncio
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from verifier.base import Completion, Grader, RewardSpec, Verdict
from verifier.rewards.registry import absolute_name, register, registered_names
from verifier.scoring.pool import ScoringPool
from verifier.scoring.scorer import build_scorer

DOCS = Path(__file__).parents[3] / "docs" / "rewards.md"
ACCURACY = RewardSpec("accuracy", weight=0.0)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    @register("test_length")
    def text_length(scale: float = 1.0):
        return lambda completion: scale * len(completion.text)

    @register("test_abstains")
    def abstains():
        return lambda completion: None

    @register("test_answers")
    def answers(value):
        return lambda completion: value

    @register("test_makes_nothing")
    def makes_nothing():
        return None


def test_rewards_are_weighted_and_abstentions_left_out() -> None:
    specs = [
        RewardSpec("test_length", weight=0.5, options={"scale": 2.0}),
        RewardSpec("boxed_exact", weight=3.0),
        RewardSpec("test_abstains"),
        RewardSpec("test_length", weight=-1.0),
    ]
    score = build_scorer(specs)(Completion(r"\boxed{5}", "5"))
    assert score.breakdown == {"boxed_exact": 1.0, "test_length": 18.0, "test_length_2": 9.0}
    assert score.reward == 3.0 * 1.0 + 0.5 * 18.0 - 9.0
    assert score.verdict is Verdict.CORRECT


def test_a_recipe_of_format_alone_keeps_the_verdict_of_its_grader() -> None:
    score = build_scorer([ACCURACY, RewardSpec("tag_format")])(Completion("<think>a</think> <answer>5</answer>", "6"))
    assert (score.reward, score.verdict) == (1.0, Verdict.WRONG)
    assert score.breakdown == {"accuracy": 0.0, "tag_format": 1.0}


def test_truncated_is_said_only_without_an_answer() -> None:
    scorer = build_scorer([RewardSpec("boxed_format")])
    assert scorer(Completion("so", "5", truncated=True)).verdict is Verdict.TRUNCATED
    assert scorer(Completion("so", "5", truncated=True)).reward == -1.0
    assert scorer(Completion(r"\boxed{5} so", "5", truncated=True)).verdict is Verdict.CORRECT


def test_unscored_pays_what_the_grader_says() -> None:
    scorer = build_scorer([RewardSpec("boxed_format", weight=2.0)])
    score = scorer.unscored(Verdict.TIMEOUT, Verdict.WRONG, skipped=True)
    assert (score.reward, score.verdict, score.skipped) == (-1.0, Verdict.TIMEOUT, True)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], r"reward names no grader, .* in \[\]; add one, for example \{name: accuracy\}"),
        ([RewardSpec("test_abstains")], "names no grader"),
        ([RewardSpec("boxed_format"), RewardSpec("countdown")], "names 2 graders, boxed_format and countdown, but"),
        ([RewardSpec("boxd_format")], "unknown reward 'boxd_format'; did you mean boxed_format"),
        ([RewardSpec("zzz")], "unknown reward 'zzz'; choose one of accuracy, "),
        ([RewardSpec("boxed_format", options={"right": 1})], "does not take the options"),
        (
            [RewardSpec("boxed_format", options={"wrong": "much"})],
            "boxed_format: wrong is 'much'; give a finite number",
        ),
        (
            [RewardSpec("accuracy", options={"after_thinking": "false"})],
            "after_thinking is 'false'; give true or false",
        ),
        ([ACCURACY, RewardSpec("cosine", options={"correct_long": math.nan})], "correct_long is nan; give a finite"),
        ([ACCURACY, RewardSpec("repetition", options={"ngram_size": 2.5})], "ngram_size is 2.5; give a whole number"),
        ([RewardSpec("accuracy", options={"format": "xml"})], "accuracy: format is 'xml'; choose one of"),
        ([RewardSpec("boxed_format", weight=math.nan)], "the weight of boxed_format is nan; give a finite"),
        ([RewardSpec("test_makes_nothing")], "test_makes_nothing made NoneType, not a Grader"),
        ([RewardSpec("no_such_module:factory")], "cannot import 'no_such_module'"),
        ([RewardSpec("verifier.rewards.registry:no_such_factory")], "has no function 'no_such_factory'"),
    ],
)
def test_what_cannot_be_built_says_why(specs: list[RewardSpec], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_scorer(specs)


def test_only_the_modules_that_call_register_fill_the_registry() -> None:
    code = (
        "import verifier.rewards.registry as registry; assert registry.registered_names() == [];"
        " import verifier.rewards.answer; assert 'accuracy' in registry.registered_names();"
        " assert 'cosine' not in registry.registered_names()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="taken"):
        register("boxed_format")(lambda: Grader(lambda _: Verdict.WRONG, {}))
    assert ":" not in "".join(registered_names())


@pytest.mark.parametrize("value", [math.inf, math.nan, "1", [1]])
def test_a_reward_that_is_no_number_raises(value: object) -> None:
    scorer = build_scorer([ACCURACY, RewardSpec("test_answers", weight=0.0, options={"value": value})])
    with pytest.raises(ValueError, match=r"the reward test_answers answered .*, which is not a number"):
        scorer(Completion("5", "5"))


# --- rewards in a user's file ----------------------------------------------------------------------------------------


def own_file(folder: Path, code: str, name: str = "own.py") -> str:
    (folder / name).write_text(code)
    return str(folder / name)


def test_the_documented_example_scores_in_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    own_file(tmp_path, code, "my_rewards.py")
    monkeypatch.chdir(tmp_path)
    name = absolute_name("my_rewards.py:brevity")
    assert name == f"{tmp_path}/my_rewards.py:brevity"
    spec = [RewardSpec("accuracy"), RewardSpec(name, weight=0.5, options={"max_tokens": 100})]
    assert build_scorer([spec[0], RewardSpec("my_rewards.py:brevity")]).functions[0][0] == "brevity"
    monkeypatch.chdir("/")
    pool = ScoringPool(spec, num_workers=1, deadline_seconds=5.0, memory_bytes=1 << 30)
    try:
        texts = [Completion(r"\boxed{5}", "5", num_tokens=number) for number in (0, 50, 400)]
        scores = asyncio.run(pool.score_group([*texts, Completion(r"\boxed{6}", "5", num_tokens=0)]))
    finally:
        pool.close()
    assert [score.breakdown for score in scores] == [
        {"accuracy": 1.0, "brevity": 1.0},
        {"accuracy": 1.0, "brevity": 0.5},
        {"accuracy": 1.0, "brevity": 0.0},
        {"accuracy": 0.0},
    ]
    assert [score.reward for score in scores] == [1.5, 1.25, 1.0, 0.0]


def test_a_file_registers_under_its_own_path_even_a_name_that_is_taken(tmp_path: Path) -> None:
    code = """
from verifier.rewards.registry import register

@register("accuracy")
def anything(value=7.0):
    return lambda completion: value

def plain():
    return lambda completion: 3.0
"""
    path = own_file(tmp_path, code)
    score = build_scorer([ACCURACY, RewardSpec(f"{path}:accuracy"), RewardSpec(f"{path}:plain")])(Completion("5", "5"))
    assert score.breakdown == {"accuracy": 1.0, "accuracy_2": 7.0, "plain": 3.0}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = = 1", "own.py line 1 is not valid Python: invalid syntax"),
        ("import no_such_thing", r"own.py cannot be loaded \(ModuleNotFoundError: No module named 'no_such_thing'\)"),
        ("raise SystemExit(3)", r"own.py cannot be loaded \(SystemExit: 3\)"),
        ("other = 1", "own.py has no function 'mine'"),
        ("mine = 1", "own.py has no function 'mine'"),
        ("def mine(): return {}['no']", "mine raised KeyError: 'no' for the options {}"),
        (
            "from verifier.base import Grader\ndef mine(): return Grader(lambda completion: 'correct', {'correct': 1})",
            "mine gives None for the verdict wrong; give a finite number",
        ),
        ("def mine(completion): return 1.0", "mine does not take the options {}.*; a reward is a function of its"),
    ],
)
def test_a_file_that_cannot_be_used_says_why_in_one_line(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        build_scorer([ACCURACY, RewardSpec(f"{own_file(tmp_path, code)}:mine")])
    assert "\n" not in str(refused.value)


def test_a_file_that_was_mended_loads_in_the_same_process(tmp_path: Path) -> None:
    code = (
        "from verifier.rewards.registry import register\n@register('mine')\ndef mine(): return lambda completion: 1.0\n"
    )
    spec = RewardSpec(f"{own_file(tmp_path, code + 'raise OSError')}:mine")
    with pytest.raises(ValueError, match="OSError"):
        build_scorer([ACCURACY, spec])
    own_file(tmp_path, code)
    assert build_scorer([ACCURACY, spec])(Completion("5", "5")).breakdown["mine"] == 1.0


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"the file {tmp_path}/none.py does not exist; a relative path counts from"):
        build_scorer([ACCURACY, RewardSpec(f"{tmp_path}/none.py:mine")])


def test_the_documented_table_names_what_is_registered() -> None:
    tables = DOCS.read_text(encoding="utf-8").partition("## Graders")[2].partition("## Your own reward")[0]
    rows = [row.split("|")[1] for row in tables.splitlines() if row.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert documented == {name for name in registered_names() if not name.startswith("test_")}


# --- golds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gold"),
    [
        ("countdown", "98"),
        ("countdown", '{"numbers": [1]}'),
        ("countdown", '{"numbers": 3, "target": 4}'),
        ("knights_knaves", '{"names": ["Ada"], "is_knight": [true, false]}'),
        ("knights_knaves", '{"names": ["Ada"], "is_knight": ["yes"]}'),
        ("knights_knaves", json.dumps({"names": [], "is_knight": []})),
        ("knights_knaves", "not json"),
    ],
)
def test_a_gold_that_is_no_problem_raises(name: str, gold: str) -> None:
    text = "<think>a</think><answer>(1) Ada is a knight</answer>"
    with pytest.raises(ValueError, match=f"{name}: the gold is .* JSON object"):
        build_scorer([RewardSpec(name)])(Completion(text, gold))
