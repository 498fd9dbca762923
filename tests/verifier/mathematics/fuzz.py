"""Fuzzes the mathematical judge with hostile and broken answers: it must not raise, hang or use much memory.

`fuzz` judges generated pairs of completion and gold in a child process with a limited address space. The parent watches
the child's processor time, so that a slow machine does not count as a hang. A failure names the seed and the pair.

`python -m tests.verifier.mathematics.fuzz --minutes 5` runs it for longer; `--seed` repeats a run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import re
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from verifier.mathematics.answer import judge
from verifier.mathematics.extract import ANSWER_FORMATS

DEADLINE_SECONDS = 5.0
MEMORY_BYTES = 1 << 30
LONG = 1_000_000
SPAWN = multiprocessing.get_context("spawn")

_ANSWERS = r"""
42 -7 1{,}000 \frac{1}{2} -\dfrac{22}{7} 3\frac12 0.5 0.\overline{3} 50\% 1.5e-3 2.5\times10^{-3} \$3.50 12\text{cm}^2
90^\circ 3\sqrt{2} \sqrt[3]{16} 3+4i 2\pi e^{2} -\infty x^2-2x+1 \frac{x+1}{x-1} \sin^2x+\cos^2x \log_2{8} y=2x+3 x=5
x>2 -1\le{}x<4 (2,\infty) [0,1)\cup(2,3] \{1,2,3\} (1,2) \begin{pmatrix}1&2\\3&4\end{pmatrix} 1\pm\sqrt{5} 1011_2
\binom{10}{3} 20! 10^{100} \text{(B)} \text{blue} 3rd yes 3:30 ½ √2 x²−1 １２ \vec{v}=\langle1,2\rangle |x-3|
\lfloor2.5\rfloor \text{no\,solution} 5\!:\!00 \frac{\pi}{4}+\frac{k\pi}{2} \{x|x\ge-2\} \mathbb{R} July~4
"""
_PIECES = r"""
\boxed{ \fbox{ } { [ ] ( ) \left( \right) \{ \} \frac{ \frac \dfrac \sqrt{ \sqrt[ ^{ ^ _ _{ ! !! \pm \mp <answer>
</answer> <think> </think> #### $ $$ \( \) \[ \] \text{ \mathrm{ \begin{pmatrix} \end{pmatrix} & \\ , ; : . ' | \| + - *
/ = < > \le \ge \ne \in \cup \cap \setminus \infty \pi \emptyset \ldots \cdot 0 1 2 9 10 99999999 0.1 .5 1e999999999 x y
z i e \% ^\circ \degree \overline{ \log_ \sin \binom{ \sum \int ² ½ √ π ∞ ٣ １ − × ﷽ Ⅻ ㍿ and or x= cm percent True
__import__('os')
"""
_BOMBS = r"""
10^{10^{10}} 9^{9^{9^{9}}} 9**9**9**9 99999999! 9!!!!!!!! \binom{10^{9}}{5\cdot10^{8}} 2^{-10^{12}} (x+y+z+1)^{9999}
(x+1)^{10^{6}} \sqrt[10^{9}]{2} \frac{1}{10^{10^{9}}} \sum_{n=1}^{10^{12}}n^{n} 1e999999999 x^{x^{x^{x^{x^{x}}}}}
\int_0^{1}x^{x}dx \lim_{x\to0}\frac{\sin{x}}{x} \tan(10^{100}) \log_{1}(1) 0^{0} \frac{0}{0} (-1)^{\frac{1}{10^{9}}}
(a+b+c+d+f+g+h)^{40}-(a-b+c-d+f-g+h)^{40} \sqrt{2+\sqrt{3+\sqrt{5+\sqrt{7+\sqrt{11}}}}}-\pi^{e^{\pi}} \gcd(10^{99},6)
"""
ANSWERS = tuple(_ANSWERS.split())
PIECES = (
    *_PIECES.split(),
    "the answer is ",
    "Final answer: ",
    " ",
    "\n",
    "\u202e",
    "\ud800",
    "\x00",
    "\ufeff",
    "\U0001f600",
)
BOMBS = (
    *_BOMBS.split(),
    "0." + "3" * 5000,
    "7" * 20_000,
    "1" + ",000" * 5000,
    "1" + "+1" * 700,
    "(-" * 300,
    "ab," * 400,
    "+".join(f"x^{{{n}}}" for n in range(200)),
)


@dataclass(frozen=True)
class Report:
    """The figures of one run of the fuzzer."""

    seed: int
    num_pairs: int
    slowest_seconds: float
    """Processor time of the slowest pair."""
    slowest: str
    peak_bytes: int
    """Peak resident memory of the judging process, less its memory at the beginning."""


class Found(AssertionError):
    """A pair that made the judge raise, hang, die, or give two different verdicts."""


def pair(rng: random.Random) -> tuple[str, str, str]:
    """Returns a random (completion, gold, format). The gold is the answer, a mutation of it, or another answer."""
    answer = any_answer(rng)
    match rng.randrange(4):
        case 0:
            gold = answer
        case 1:
            gold = mutated(answer, rng) if len(answer) < 5000 else answer[:-1]
        case _:
            gold = any_answer(rng)
    shapes = (r"\boxed{%s}", r"So $\boxed{%s}$.", "<answer>%s</answer>", "#### %s", "The answer is %s", "%s")
    completion = rng.choice(shapes).replace("%s", answer)
    if rng.random() < 0.1:
        completion = mutated(completion, rng) if len(completion) < 5000 else completion * 2
    return completion, gold, rng.choice(ANSWER_FORMATS)


def any_answer(rng: random.Random) -> str:
    """A random answer: mostly short, rarely a megabyte."""
    kind = rng.choices(range(6), weights=(120, 75, 36, 36, 30, 1))[0]
    match kind:
        case 0:
            return mutated(rng.choice(ANSWERS), rng)
        case 1:
            return "".join(rng.choices(PIECES, k=rng.randint(1, 40)))
        case 2:
            return rng.choice(BOMBS)
        case 3:
            return rng.randbytes(rng.randint(0, 300)).decode("utf-8", "surrogateescape")
        case 4:
            return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randint(0, 60)))
    return oversized(rng)


def oversized(rng: random.Random) -> str:
    """Ten thousand braces, nesting ten thousand levels deep, or a megabyte of pieces."""
    piece = rng.choice([*PIECES, *ANSWERS])
    match rng.randrange(4):
        case 0:
            return "{" * 10_000 + rng.choice(["", "1"]) + "}" * rng.choice([0, 9_999, 10_000])
        case 1:
            opener, closer = rng.choice(
                [("(", ")"), (r"\frac{1}{", "}"), (r"\sqrt{", "}"), ("x^{", "}"), (r"\left[", r"\right]"), ("-", "")]
            )
            return opener * 10_000 + "1" + closer * 10_000
        case 2:
            return piece * (LONG // len(piece))
    return "".join(rng.choices(PIECES, k=LONG // 4))


def mutated(text: str, rng: random.Random) -> str:
    """Applies up to three mutations: removes, doubles, reverses or inserts text, or appends another answer's tail."""
    for _ in range(rng.randint(0, 3)):
        at = rng.randrange(len(text) + 1)
        to = min(len(text), at + rng.choice([1, 1, 2, 5]))
        other = rng.choice(ANSWERS)
        match rng.randrange(5):
            case 0:
                text = text[:at] + text[to:]
            case 1:
                text = text[:to] + text[at:]
            case 2:
                text = text[:at] + text[at:to][::-1] + text[to:]
            case 3:
                text = text[:at] + rng.choice(PIECES) + text[at:]
            case 4:
                text = text[:at] + other[rng.randrange(len(other)) :]
    return text


def shown(completion: str, gold: str, answer_format: str) -> str:
    parts = (
        ascii(text[:200]) + (f" ({len(text)} characters)" if len(text) > 200 else "") for text in (completion, gold)
    )
    return f"completion {' gold '.join(parts)} format {answer_format}"


def fuzz(seed: int, seconds: float) -> Report:
    """Judges random pairs for `seconds`.

    Raises:
        Found: at the first pair that fails.
    """
    receiving, sending = SPAWN.Pipe(duplex=False)
    at = SPAWN.Value("q", -1)
    process = SPAWN.Process(target=_judge_pairs, args=(seed, seconds, at, sending), daemon=True)
    process.start()
    sending.close()
    try:
        return _watch(process, seed, at, receiving)
    finally:
        process.kill()
        process.join()


def _watch(process: Any, seed: int, at: Any, receiving: Connection) -> Report:
    """Waits for: the child's report. Gives up after: DEADLINE_SECONDS of processor time for one pair."""
    child, pair_of, cpu_before = psutil.Process(process.pid), -2, 0.0
    while not receiving.poll(0.1):
        times = child.cpu_times()
        cpu_seconds = times.user + times.system
        if at.value != pair_of:
            pair_of, cpu_before = at.value, cpu_seconds
        elif pair_of >= 0 and cpu_seconds - cpu_before > DEADLINE_SECONDS:
            raise Found(f"seed {seed}, pair {pair_of} hangs: {_named(seed, pair_of)}")
    try:
        report = receiving.recv()
    except EOFError:
        raise Found(f"seed {seed}, pair {at.value} killed the process: {_named(seed, at.value)}") from None
    if isinstance(report, str):
        raise Found(f"seed {seed}, pair {at.value}: {report}: {_named(seed, at.value)}")
    assert isinstance(report, Report)
    return report


def _pairs(seed: int) -> Iterator[tuple[str, str, str]]:
    rng = random.Random(seed)
    while True:
        yield pair(rng)


def _named(seed: int, index: int) -> str:
    pairs = _pairs(seed)
    for _ in range(index):
        next(pairs)
    return shown(*next(pairs))


def _judge_pairs(seed: int, seconds: float, at: Any, sending: Connection) -> None:
    slowest_seconds, slowest = 0.0, ""
    memory = psutil.Process().memory_info()
    soft = memory.vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
    end = time.monotonic() + seconds
    try:
        for index, (completion, gold, answer_format) in enumerate(_pairs(seed)):
            at.value = index
            begin = time.process_time()
            _check(completion, gold, answer_format)
            took = time.process_time() - begin
            if took > slowest_seconds:
                slowest_seconds, slowest = took, shown(completion, gold, answer_format)
            if time.monotonic() > end:
                break
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        sending.send(f"{type(error).__name__}: {str(error)[:500]} in {frame.name}, {frame.filename}:{frame.lineno}")
        return
    # Not getrusage, whose maximum includes the parent's memory at the start of this process.
    [peak_kib] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    peak_bytes = int(peak_kib) * 1024 - memory.rss
    sending.send(Report(seed, index + 1, slowest_seconds, slowest, peak_bytes))


def _check(completion: str, gold: str, answer_format: Any) -> None:
    """Judges a pair twice and asserts that the verdicts are the same."""
    first = judge(completion, gold, format=answer_format)
    if len(completion) + len(gold) < 2_000:
        assert judge(completion, gold, format=answer_format).verdict == first.verdict, "another verdict the second time"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.verifier.mathematics.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long to judge random pairs")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32), help="repeats a run")
    options = parser.parse_args()
    try:
        report = fuzz(options.seed, 60 * options.minutes)
    except Found as found:
        print(found, file=sys.stderr)
        return 1
    print(
        f"seed {report.seed}: {report.num_pairs:,} pairs, no failure; slowest {report.slowest_seconds:.2f} s of CPU"
        f" time, peak {report.peak_bytes / 1e6:.0f} MB\nslowest: {report.slowest}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
