"""Checks of the grader and of the scoring pool.

- `same_verdicts`: verdicts do not depend on threads, processes, order, hash seeds or gmpy2.
- `executions`: no payload in a completion is executed; an executed payload would create a file.
- `pool_with_hangs`: the time of the scoring pool when one answer in a hundred hangs.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.parts.verifier.asking import Item, Unavailable, ask
from verifier.base import Completion, Grader, RewardSpec, Verdict
from verifier.mathematics.answer import is_correct, judge
from verifier.scoring.pool import ScoringPool

SEEDS = ("1", "2", "3")
GROUP_SIZE = 8
MEMORY_BYTES = 2 << 30
PAYLOADS = (
    "__import__('os').system('touch %s')",
    "open('%s','w')",
    "exec(\"open('%s','w')\")",
    "eval(\"open('%s','w')\")",
    "sqrt.__globals__['__builtins__']['open']('%s','w')",
    'sqrt.__globals__["__builtins__"]["open"]("%s","w")+1',
    "1+sqrt.__globals__['__builtins__']['exec'](\"open('%s','w')\")",
    "x.__class__.__init__.__globals__['__builtins__']['open']('%s','w')",
    "(lambda:open('%s','w'))()",
    "[open('%s','w') for i in [1]][0]",
    "{0.__class__.__init__.__globals__[os]}; open('%s','w')",
    "f\"{open('%s','w')}\"",
    'S(\'open("%s","w")\')',
    "sympify(\"__import__('os').system('touch %s')\")",
    'lambdify((),\'open("%s","w")\')()',
    "\\immediate\\write18{touch %s}",
    "$(touch %s)",
    "`touch %s`",
    "7; import os; os.system('touch %s')",
    "7\nimport os\nos.system('touch %s')",
)


def same_verdicts(items: Sequence[Item], deadline_seconds: float, gmpy2: Path | None) -> dict[str, int | str]:
    """Returns, by circumstance, how many verdicts differ from those of a process with hash seed 0.

    The value is a text with the reason where a circumstance was not tried.
    """

    def asked(chosen: Sequence[Item], **environment: str) -> tuple[str, list[Any]]:
        answers = ask("ours", sys.executable, chosen, deadline_seconds, environment)
        return answers.release, [outcome.correct for outcome in answers.outcomes]

    _, first = asked(items, PYTHONHASHSEED="0")
    found: dict[str, int | str] = {}

    def count(label: str, verdicts: Sequence[Any]) -> None:
        found[label] = sum(one != other for one, other in zip(first, verdicts, strict=True))

    count("in four threads at once", in_threads(items, 4))
    for seed in SEEDS:
        count(f"another process, PYTHONHASHSEED={seed}", asked(items, PYTHONHASHSEED=seed)[1])
    order = random.Random(0).sample(range(len(items)), len(items))
    shuffled = asked([items[at] for at in order], PYTHONHASHSEED="4")[1]
    count("another order", [verdict for _, verdict in sorted(zip(order, shuffled, strict=True))])
    if gmpy2 is None:
        found["with gmpy2"] = "not tried: name its folder by --gmpy2"
        return found
    backend, verdicts = asked(items, PYTHONPATH=str(gmpy2))
    if backend != "gmpy":
        found["with gmpy2"] = f"not tried: {gmpy2} gives sympy the backend {backend}"
    else:
        count("with gmpy2", verdicts)
    return found


def in_threads(items: Sequence[Item], num_threads: int) -> list[bool | None]:
    """Judges every item in several threads at once; returns the verdicts, with None where the threads differ."""
    verdicts: list[list[bool]] = [[] for _ in range(num_threads)]

    def run(answers: list[bool]) -> None:
        for item in items:
            answers.append(any(is_correct(item.completion, gold, format=item.format) for gold in item.golds))

    threads = [threading.Thread(target=run, args=(answers,)) for answers in verdicts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[0] if len(set(answers)) == 1 else None for answers in zip(*verdicts, strict=True)]


def executions(name: str, python: str, deadline_seconds: float) -> int | str:
    """Returns how many payloads a grader executes, in every form of an answer; or a text why it does not start."""
    shapes = ("$\\boxed{%s}$", "The answer is %s", "<answer>%s</answer>", "%s")
    with tempfile.TemporaryDirectory(prefix="canary-") as folder:
        items = [
            Item("payload", shape.replace("%s", payload.replace("%s", f"canary{index}")), ("7",), False)
            for index, payload in enumerate(PAYLOADS)
            for shape in shapes
        ]
        try:
            ask(name, python, items, deadline_seconds, folder=Path(folder))
        except Unavailable as reason:
            return str(reason)
        return len(list(Path(folder).glob("canary*")))


def hanging() -> Grader:
    """A grader for `pool_with_hangs`: the mathematical judge, which never returns for the completion `hang`."""

    def grade(completion: Completion) -> Verdict:
        while completion.text == "hang":
            pass
        return judge(completion.text, completion.gold).verdict

    return Grader(grade, {Verdict.CORRECT: 1.0, Verdict.WRONG: 0.0, Verdict.NO_ANSWER: 0.0})


def pool_with_hangs(
    items: Sequence[Item], num_answers: int, num_workers: int, deadline_seconds: float
) -> dict[str, Any]:
    """Measures the seconds of the scoring pool without hangs, and with one hang in a hundred answers.

    `ratio` = seconds with hangs / (seconds without + hangs x deadline / workers). It is 1 when no other answer waits
    for a hang.
    """
    good = [
        Completion(item.completion, item.golds[0])
        for item, _ in zip(items * num_answers, range(num_answers), strict=False)
    ]
    num_hangs = num_answers // 100
    mixed = list(good)
    for at in random.Random(0).sample(range(num_answers), num_hangs):
        mixed[at] = Completion("hang", "7")
    without, _ = _timed(good[: num_answers - num_hangs], num_workers, deadline_seconds)
    with_hangs, verdicts = _timed(mixed, num_workers, deadline_seconds)
    share = num_hangs * deadline_seconds / num_workers
    return {
        "answers": num_answers,
        "hangs": num_hangs,
        "timeouts": verdicts.count(Verdict.TIMEOUT),
        "workers": num_workers,
        "deadline_seconds": deadline_seconds,
        "seconds_without_hangs": without,
        "seconds_with_hangs": with_hangs,
        "seconds_of_deadlines": share,
        "ratio": with_hangs / (without + share),
    }


def _timed(completions: Sequence[Completion], num_workers: int, deadline_seconds: float) -> tuple[float, list[Verdict]]:
    async def run() -> list[Verdict]:
        groups = [completions[at : at + GROUP_SIZE] for at in range(0, len(completions), GROUP_SIZE)]
        scored = await asyncio.gather(*(pool.score_group(group) for group in groups))
        return [score.verdict for group in scored for score in group]

    spec = [RewardSpec("benchmarks.parts.verifier.trust:hanging")]
    pool = ScoringPool(spec, num_workers=num_workers, deadline_seconds=deadline_seconds, memory_bytes=MEMORY_BYTES)
    try:
        begin = time.perf_counter()
        verdicts = asyncio.run(run())
        return time.perf_counter() - begin, verdicts
    finally:
        pool.close()
