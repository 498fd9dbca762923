"""The figures of `benchmarks/gpu.py` as Markdown tables, for the terminal and for docs/gpu.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- benchmarks/gpu.py writes below -->", "<!-- benchmarks/gpu.py wrote above -->"


def tables(figures: dict[str, Any]) -> str:
    """Returns Markdown: command, machine and versions, then one table per part."""
    parts = [_where(figures)]
    measured = figures["shapes"]
    limit = figures["matmul"]
    for title, rows in (
        ("learner", [_learner(name, found["learner"], limit) for name, found in measured.items()]),
        ("head", [row for name, found in measured.items() for row in _head(name, found["head"])]),
        ("publication", [row for name, found in measured.items() for row in _publication(name, found["publication"])]),
        ("loop", [_loop(transport, found) for transport, found in figures["loop"].items()]),
    ):
        parts.append(_table(COLUMNS[title], rows))
    return "\n\n".join(parts) + "\n"


COLUMNS = {
    "learner": ("step of", "tokens/s (spread)", "TFLOP/s", "of the matmul limit", "of the data sheet", "peak GB", ""),
    "head": ("head of", "way", "tokens", "peak MB", "ms", "error of log p, of the gradients"),
    "publication": ("publication of", "way", "learner held, s", "ready, s", "GB/s held", "GB/s of a copy"),
    "loop": ("loop", "samples/s", "tokens/s", "step, s", "actor idle", "learner idle"),
}


def _where(figures: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
    head = f"`{figures['command']}`; {figures['machine']}; {versions}."
    limit = figures["matmul"]
    if "skipped" in limit:
        return f"{head} Matmul limit: {limit['skipped']}."
    low, high = limit["spread"]
    sheet = f", by its data sheet {limit['sheet_tflops']}" if limit["sheet_tflops"] else ""
    return (
        f"{head} On {limit['device']} a {limit['dtype']} product of {limit['size']:,} squared makes"
        f" **{limit['tflops']:.3g} TFLOP/s** ({low:.3g} to {high:.3g}){sheet}."
    )


def _learner(name: str, found: dict[str, Any], limit: dict[str, Any]) -> Sequence[str]:
    if "skipped" in found:
        return name, _skipped(found)
    low, high = found["spread"]
    notes = [found["how"], *(["checkpointing"] if found["checkpointing"] else [])]
    return (
        name,
        f"{found['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f})",
        f"{found['tflops']:.3g}",
        _share(found["tflops"], limit.get("tflops")),
        _share(found["tflops"], limit.get("sheet_tflops")),
        f"{found['peak_mb'] / 1e3:.1f}",
        ", ".join([*notes, *(["fused head"] if found["fused_head"] else [])]),
    )


def _head(name: str, found: dict[str, Any]) -> list[Sequence[str]]:
    if "skipped" in found:
        return [(name, _skipped(found))]
    rows: list[Sequence[str]] = []
    for way, measured in found["ways"].items():
        if "skipped" in measured:
            rows.append((name, way, _skipped(measured)))
            continue
        errors = (measured[f"{of}_error"] for of in ("logprob", "hidden_gradient", "weight_gradient"))
        figures = f"{measured['peak_mb']:,.0f}", f"{1e3 * measured['seconds']:,.1f}"
        rows.append((name, way, f"{found['num_tokens']:,}", *figures, ", ".join(f"{error:.1e}" for error in errors)))
    return rows


def _publication(name: str, found: dict[str, Any]) -> list[Sequence[str]]:
    if "skipped" in found:
        return [(name, _skipped(found))]
    rows: list[Sequence[str]] = []
    for way in ("shared_memory", "ipc"):
        measured = found[way]
        if "skipped" in measured:
            rows.append((name, way.replace("_", " "), _skipped(measured)))
            continue
        # Over IPC the copy is the one that the reading process makes.
        copy = measured["read_seconds"] if way == "ipc" else found["copy_seconds"]
        held, ready = (measured[f"{kind}_seconds"] for kind in ("stall", "ready"))
        speeds = f"{found['gb'] / held:,.1f}", f"{found['gb'] / copy:,.1f}"
        rows.append((f"{name}, {found['gb']:.2f} GB", way.replace("_", " "), f"{held:.3f}", f"{ready:.3f}", *speeds))
    return rows


def _loop(transport: str, found: dict[str, Any]) -> Sequence[str]:
    name = f"tiny model, weights={transport}"
    if "skipped" in found:
        return name, _skipped(found)
    idle = (f"{100 * found[f'{who}_idle_fraction']:.0f} %" for who in ("actor", "learner"))
    rates = f"{found['samples_per_second']:,.0f}", f"{found['tokens_per_second']:,.0f}"
    return (name, *rates, f"{found['step_seconds']:.3f}", *idle)


def _share(part: float, whole: float | None) -> str:
    return f"{100 * part / whole:.0f} %" if whole else ""


def _skipped(found: dict[str, Any]) -> str:
    return f"not measured: {found['skipped']}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    full = [columns, ["---"] * len(columns), *([*row, *[""] * (len(columns) - len(row))] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in full)


def write_docs(page: Path, text: str) -> None:
    """Replace the text between the marks BEGIN and END of a page.

    Raises:
        ValueError: when the page lacks a mark.
    """
    before, mark, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"{page} has no place for figures; put {BEGIN} and {END} where they belong")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")
