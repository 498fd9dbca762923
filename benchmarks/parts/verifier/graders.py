r"""The graders of `benchmarks/verifier.py`, each with its own extraction of the answer, in a process of their own.

`benchmarks/parts/verifier/asking.py` runs `graders.py NAME ITEMS START` with a Python that has the grader. ITEMS is a
file of JSON lines [completion, golds, format]; an answer that equals one of the golds is correct. The process prints
`ready VERSION`, and then a JSON line for every item from number START on: [true, false or null, seconds, processor
seconds, exception or ""]. The grader's own output is discarded.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
import types
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

Grader = Callable[[str, str, str], bool]
"""Takes (completion, gold, format) and returns whether the completion is correct."""


def ours() -> tuple[str, Grader]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    # Remove this file's folder, whose modules could hide those of libraries.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    judge = importlib.import_module("verifier.mathematics.answer").judge
    # mpmath and sympy use gmpy2 when it is installed, so the arithmetic backend is reported in place of a version.
    backend = str(importlib.import_module("mpmath.libmp").BACKEND)
    return backend, lambda completion, gold, form: judge(completion, gold, format=form).verdict == "correct"


def math_verify() -> tuple[str, Grader]:
    library = importlib.import_module("math_verify")

    def grade(completion: str, gold: str, form: str) -> bool:
        # Math-Verify's parser only finds a gold inside mathematics, so its users put it in a box.
        boxed = gold if "boxed" in gold or "####" in gold else f"\\boxed{{{gold}}}"
        return bool(library.verify(library.parse(boxed), library.parse(completion)))

    return version("math-verify"), grade


def mathruler() -> tuple[str, Grader]:
    """PRM800K's grader."""
    library = importlib.import_module("mathruler.grader")

    def grade(completion: str, gold: str, form: str) -> bool:
        return bool(library.grade_answer(library.extract_boxed_content(completion), gold))

    return version("mathruler"), grade


def qwen() -> tuple[str, Grader]:
    """The grader of Qwen2.5-Math's evaluation, as EvalScope shipped it."""
    _without_init("evalscope", "evalscope.metrics")
    library = importlib.import_module("evalscope.metrics.math_parser")

    def grade(completion: str, gold: str, form: str) -> bool:
        answer = library.extract_answer(completion)
        return bool(library.math_equal(library.strip_answer_string(answer), library.strip_answer_string(gold)))

    return version("evalscope"), grade


def prime() -> tuple[str, Grader]:
    """PRIME's grader, as verl ships it."""
    _without_init("verl", "verl.utils", "verl.utils.reward_score")
    # The package imports this module, which the grader does not use and which needs torch.
    sys.modules["verl.utils.metric"] = types.ModuleType("verl.utils.metric")
    sys.modules["verl.utils.metric"].Metric = object  # type: ignore[attr-defined]
    library = importlib.import_module("verl.utils.reward_score.prime_math")
    return version("verl"), lambda completion, gold, form: bool(library.compute_score(completion, gold)[0])


def dapo() -> tuple[str, Grader]:
    """DAPO's comparison of normalized texts, as verl ships it."""
    _without_init("verl", "verl.utils", "verl.utils.reward_score")
    library = importlib.import_module("verl.utils.reward_score.math_dapo")
    return version("verl"), lambda completion, gold, form: bool(library.compute_score(completion, gold)["acc"])


def lm_eval() -> tuple[str, Grader]:
    """The grader of lm-evaluation-harness's SCORE tasks."""
    _without_init("lm_eval", "lm_eval.tasks", "lm_eval.tasks.score", "lm_eval.tasks.score.math")
    library = importlib.import_module("lm_eval.tasks.score.math.math_grader")

    def grade(completion: str, gold: str, form: str) -> bool:
        return bool(library.math_equal(library.extract_answer(completion), gold))

    return version("lm-eval"), grade


def sympy_only() -> tuple[str, Grader]:
    """A grader of ten lines: the last box, sympy's LaTeX parser, simplify. It evaluates text of the model."""
    sympy = importlib.import_module("sympy")
    parse = importlib.import_module("sympy.parsing.latex").parse_latex

    def grade(completion: str, gold: str, form: str) -> bool:
        _, box, rest = completion.rpartition("\\boxed{")
        answer = rest.rpartition("}")[0] if box else completion
        return answer == gold or bool(sympy.simplify(parse(answer) - parse(gold)) == 0)

    return version("sympy"), grade


GRADERS: dict[str, Callable[[], tuple[str, Grader]]] = {
    "ours": ours,
    "math-verify": math_verify,
    "mathruler": mathruler,
    "qwen": qwen,
    "prime": prime,
    "dapo": dapo,
    "lm-eval": lm_eval,
    "sympy": sympy_only,
}
LABELS = {
    "ours": "Slipstream",
    "math-verify": "Math-Verify",
    "mathruler": "PRM800K (mathruler)",
    "qwen": "Qwen2.5-Math (evalscope)",
    "prime": "PRIME (verl)",
    "dapo": "DAPO (verl)",
    "lm-eval": "SCORE (lm-eval)",
    "sympy": "sympy alone",
}


def _without_init(*packages: str) -> None:
    """Registers empty packages, so that one file of a large package can be imported without the package's imports."""
    for name in packages:
        top, _, rest = name.partition(".")
        spec = find_spec(top) if not rest else None
        module = types.ModuleType(name)
        if rest:
            module.__path__ = [
                str(Path(entry, rest.rpartition(".")[2])) for entry in sys.modules[name.rpartition(".")[0]].__path__
            ]
        elif spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        else:
            module.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = module


def cpu_seconds() -> float:
    """Processor time of this process, and of the child processes that a grader has started and waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main() -> None:
    name, items, start = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    warnings.simplefilter("ignore")
    try:
        release, grade = GRADERS[name]()
    except Exception as error:
        answers.write(f"{type(error).__name__}: {error}\n")
        return
    os.dup2(silence, 2)
    # This answer is not measured, because some graders import modules with the first answer.
    grade("So the answer is $\\boxed{\\frac{x+1}{2}}$.", "\\frac{1+x}{2}", "boxed")
    answers.write(f"ready {release}\n")
    for line in items.read_text(encoding="utf-8").splitlines()[start:]:
        completion, golds, form = json.loads(line)
        correct, problem, begin, cpu_begin = None, "", time.perf_counter(), cpu_seconds()
        try:
            correct = any(grade(completion, gold, form) for gold in golds)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"[:200]
        answer = [correct, time.perf_counter() - begin, cpu_seconds() - cpu_begin, problem]
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
