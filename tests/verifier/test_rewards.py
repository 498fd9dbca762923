"""Rewards: what each pays for what, how they add up, and which configurations are refused."""

import json
import math

import pytest

from verifier.base import Completion, Grader, RewardSpec, Verdict
from verifier.rewards import build_scorer, register, registered_names

COUNTDOWN = json.dumps({"numbers": [44, 19, 35], "target": 98})


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    @register("test_length")
    def text_length(scale: float = 1.0):
        return lambda completion: scale * len(completion.text)

    @register("test_abstains")
    def abstains():
        return lambda completion: None

    @register("test_infinite")
    def infinite():
        return lambda completion: math.inf


@pytest.mark.parametrize(
    ("name", "text", "gold", "reward", "verdict"),
    [
        ("boxed_math", r"\boxed{0.5}", r"\frac{1}{2}", 1.0, Verdict.CORRECT),
        ("boxed_math", r"\boxed{0.6}", r"\frac{1}{2}", -0.5, Verdict.WRONG),
        ("boxed_math", "0.5", r"\frac{1}{2}", -1.0, Verdict.NO_ANSWER),
        ("boxed_math", "<answer>0.5</answer>", r"\frac{1}{2}", -1.0, Verdict.NO_ANSWER),
        ("accuracy_math", "The answer is 0.5.", r"\frac{1}{2}", 1.0, Verdict.CORRECT),
        ("accuracy_math", r"\boxed{0.6}", r"\frac{1}{2}", 0.0, Verdict.WRONG),
        ("accuracy_math", "hm", r"\frac{1}{2}", 0.0, Verdict.NO_ANSWER),
        ("boxed_exact", r"\boxed{ 042 }", "42", 1.0, Verdict.CORRECT),
        ("boxed_exact", r"\boxed{4 2}", "42", 1.0, Verdict.CORRECT),
        ("boxed_exact", r"\boxed{x+1}", "x + 1", 1.0, Verdict.CORRECT),
        ("boxed_exact", r"\boxed{43}", "42", -0.5, Verdict.WRONG),
        ("boxed_exact", r"\boxed{84/2}", "42", -0.5, Verdict.WRONG),
        ("boxed_exact", "42", "42", -1.0, Verdict.NO_ANSWER),
        ("countdown", "<answer>44 + 19 + 35</answer>", COUNTDOWN, 1.0, Verdict.CORRECT),
        ("countdown", "<answer>44 + 19</answer>", COUNTDOWN, 0.1, Verdict.WRONG),
        ("countdown", "44 + 19 + 35", COUNTDOWN, 0.0, Verdict.NO_ANSWER),
        ("multiply", "<answer>56,088</answer>", "56088", 1.0, Verdict.CORRECT),
        ("multiply", "<answer>56089</answer>", "56088", 0.1, Verdict.WRONG),
        ("multiply", "56088", "56088", 0.0, Verdict.NO_ANSWER),
    ],
)
def test_rewards_of_the_recipes(name: str, text: str, gold: str, reward: float, verdict: Verdict) -> None:
    score = build_scorer([RewardSpec(name)])(Completion(text, gold))
    assert (score.reward, score.verdict, score.breakdown) == (reward, verdict, {name: reward})


def test_options_change_the_numbers() -> None:
    scorer = build_scorer([RewardSpec("boxed_math", options={"correct": 2, "wrong": 0, "no_answer": -3})])
    assert [scorer(Completion(text, "5")).reward for text in (r"\boxed{5}", r"\boxed{6}", "5")] == [2, 0, -3]


def test_truncated_is_said_only_without_an_answer() -> None:
    scorer = build_scorer([RewardSpec("boxed_math")])
    assert scorer(Completion("so", "5", truncated=True)).verdict is Verdict.TRUNCATED
    assert scorer(Completion("so", "5", truncated=True)).reward == -1.0
    assert scorer(Completion(r"\boxed{5} so", "5", truncated=True)).verdict is Verdict.CORRECT


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


def test_unscored_pays_what_the_grader_says() -> None:
    score = build_scorer([RewardSpec("boxed_math", weight=2.0)]).unscored(Verdict.TIMEOUT, Verdict.WRONG)
    assert (score.reward, score.verdict) == (-1.0, Verdict.TIMEOUT)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "exactly one grader"),
        ([RewardSpec("test_abstains")], "exactly one grader"),
        ([RewardSpec("boxed_math"), RewardSpec("countdown")], "exactly one grader"),
        ([RewardSpec("boxed_maths")], "unknown reward 'boxed_maths'; choose one of accuracy_math"),
        ([RewardSpec("boxed_math", options={"right": 1})], "does not take the options"),
        ([RewardSpec("accuracy_math", options={"format": "xml"})], "choose one of any, boxed, tags"),
        ([RewardSpec("boxed_math", weight=math.nan)], "finite"),
        ([RewardSpec("no_such_module:factory")], "cannot import"),
        ([RewardSpec("verifier.rewards:no_such_factory")], "cannot import"),
    ],
)
def test_what_cannot_be_built_says_why(specs: list[RewardSpec], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_scorer(specs)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="taken"):
        register("boxed_math")(lambda: Grader(lambda _: Verdict.WRONG, {}))
    assert {"boxed_math", "accuracy_math", "boxed_exact", "countdown", "multiply"} <= set(registered_names())


def test_a_reward_that_is_no_number_raises() -> None:
    scorer = build_scorer([RewardSpec("boxed_exact"), RewardSpec("test_infinite")])
    with pytest.raises(ValueError, match="not a number"):
        scorer(Completion(r"\boxed{5}", "5"))


@pytest.mark.parametrize("gold", ["98", '{"numbers": [1]}', '{"numbers": 3, "target": 4}', "not json"])
def test_a_countdown_gold_that_is_no_problem_raises(gold: str) -> None:
    with pytest.raises(ValueError, match="JSON object"):
        build_scorer([RewardSpec("countdown")])(Completion("<answer>3</answer>", gold))
