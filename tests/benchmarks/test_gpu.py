"""`benchmarks/gpu.py` on a CPU, where the same code measures a tiny model."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.parts.gpu import learner
from benchmarks.parts.gpu.report import BEGIN, END, tables, write_docs
from benchmarks.parts.gpu.work import SHAPES, Meter, num_parameters, random_model
from benchmarks.parts.learner.work import sequences
from benchmarks.parts.marked_lines import MARK

CPU = Meter(torch.device("cpu"))


@pytest.mark.usefixtures("one_rank")
def test_everything_is_measured_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    gpu.main(["--device", "cpu", "--shapes", "tiny", "--quick", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    found = figures["shapes"]["tiny"]
    step, head, publication = found["learner"], found["head"], found["publication"]
    low, high = step["spread"]
    assert step["how"] == "DeepSpeed" and 0 < low <= step["tokens_per_second"] <= high
    assert figures["matmul"]["tflops"] > 0
    for way in ("naive", "chunked"):
        assert all(head["ways"][way][f"{of}_error"] < 1e-5 for of in ("logprob", "hidden_gradient", "weight_gradient"))
    assert 0 < publication["shared_memory"]["stall_seconds"] < publication["shared_memory"]["ready_seconds"]
    assert "CUDA" in publication["ipc"]["skipped"] and "quick" in figures["loop"]["file"]["skipped"]
    shown = capsys.readouterr().out
    assert shown.strip() == tables(figures).strip() and "| tiny | chunked | 64 |" in shown

    page = tmp_path / "gpu.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        write_docs(page, tables(figures))
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n") and "old" not in text
    assert text.count("| learner held, s |") == 1
    page.write_text("no place")
    with pytest.raises(ValueError, match="has no place for figures"):
        write_docs(page, "")


def test_without_deepspeed_the_same_step_is_made_by_torch_and_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(learner, "find_spec", lambda _: None)
    found = learner.learner(CPU, SHAPES["tiny"], quick=True)
    assert "DeepSpeed is not installed" in found["how"] and found["tokens_per_second"] > 0


def test_what_fails_or_is_late_is_left_out_with_its_reason():
    def process(code: str, minutes: float = 1.0) -> dict[str, object]:
        return gpu.apart([sys.executable, "-c", code], gpu.Clock(minutes))

    assert process(f"print('noise'); print({MARK!r} + '{{\"tflops\": 1.5}}')") == {"tflops": 1.5}
    assert process("raise MemoryError('of the device')") == {"skipped": "MemoryError: of the device"}
    assert process("import signal; signal.pause()", 0.005) == {"skipped": "it was not done when the time was over"}


def test_shapes_and_their_operations_are_those_of_the_models():
    parameters = {name: num_parameters(random_model(SHAPES[name], torch.device("meta"))) for name in ("0.5B", "7B")}
    assert parameters == {"0.5B": 494_032_768, "7B": 7_615_616_512}
    shape = SHAPES["tiny"]
    data = sequences(shape.work(quick=True))
    layers = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    scored = data.num_tokens - sum(data.prompt_lengths)
    seen = sum(place + 1 for ids in data.token_ids for place in range(len(ids)))
    forward = 2 * data.num_tokens * layers + 2 * scored * 64 * 512 + 2 * 4 * 64 * seen
    assert shape.step_flops(shape.work(quick=True), data) == 3 * forward


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [([], "torch sees no CUDA device"), (["--device", "cpu", "--write-docs"], "have no place in docs/gpu.md")],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert complaint in capsys.readouterr().err
