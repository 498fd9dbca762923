"""The tables and the plot of `benchmarks/verifier.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.parts.verifier.graders import LABELS

PART_TITLES = {
    "own_solutions": "gold against the answer in its own solution",
    "rewritings": "gold against generated rewritings and changes",
    "cases": "labelled cases",
}


def percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def show(figures: dict[str, Any], console: Console) -> None:
    """Print every table. Graders are the rows of the first table and the columns of the tables by kind."""
    graders = figures["graders"]
    _show_graders(graders, console)
    for part in ("own_solutions", "cases"):
        _show_kinds(part, graders, console)
    if "all_data" in figures:
        _show_all(figures["all_data"], console)
    table = Table(title=f"differing verdicts of {figures['same_verdict']['items']:,}")
    for column in ("", "differing"):
        table.add_column(column, justify="right" if column else "left")
    for label, count in figures["same_verdict"]["differing"].items():
        table.add_row(label, str(count))
    console.print(table)
    pool = figures["pool"]
    console.print(
        f"pool of {pool['workers']}, {pool['answers']:,} answers with {pool['hangs']} hangs:"
        f" {pool['seconds_with_hangs']:.1f} s; the good ones alone {pool['seconds_without_hangs']:.1f} s,"
        f" the deadlines' share {pool['seconds_of_deadlines']:.1f} s; ratio {pool['ratio']:.2f};"
        f" {pool['timeouts']} verdicts `timeout`"
    )
    for name, reason in figures["skipped"].items():
        console.print(f"{LABELS.get(name, name)} skipped: {reason}", markup=False)


def _show_graders(graders: dict[str, Any], console: Console) -> None:
    table = Table(title="agreement with the labels, false positives and negatives; answers per second of CPU time")
    measures = (
        "cases",
        "fp",
        "fn",
        "boxed",
        "rewritings",
        "fp",
        "fn",
        "own",
        "answers/s",
        "spread",
        "p50 ms",
        "p99 ms",
    )
    for column in ("", *measures, "hangs", "exceptions", "executed"):
        table.add_column(column, justify="right" if column else "left")
    for name, found in graders.items():
        cells = []
        for part in ("cases", "rewritings"):
            result = found["parts"][part]
            cells += [percent(result["agreement"]), str(result["false_positives"]), str(result["false_negatives"])]
            if part == "cases":
                cells.append(percent(found["parts"]["boxed_cases"]["agreement"]))
        low, high = found["spread"]
        table.add_row(
            f"{LABELS[name]} {'' if name == 'ours' else found['release']}",
            *cells,
            percent(found["parts"]["own_solutions"]["agreement"]),
            f"{found['answers_per_cpu_second']:,.0f}",
            f"{low:,.0f} to {high:,.0f}",
            f"{found['p50_ms']:.2f}",
            f"{found['p99_ms']:.1f}",
            str(found["hangs"] + found["deaths"]),
            str(found["exceptions"]),
            str(found["executions"]),
        )
    console.print(table)


def _show_kinds(part: str, graders: dict[str, Any], console: Console) -> None:
    kinds = list(graders["ours"]["parts"][part]["kinds"]) if "ours" in graders else []
    if not kinds:
        return
    table = Table(title=f"{PART_TITLES[part]}: agreement")
    table.add_column("")
    table.add_column("items", justify="right")
    for name in graders:
        table.add_column(LABELS[name], justify="right")
    for kind in kinds:
        results = [found["parts"][part]["kinds"][kind] for found in graders.values()]
        cells = [percent(result["agreement"]) for result in results]
        table.add_row(kind, str(results[0]["items"]), *cells)
    console.print(table)


def _show_all(everything: dict[str, Any], console: Console) -> None:
    table = Table(title="Slipstream over all the data: agreement")
    for column in ("", "items", "agreement", "false positives", "false negatives"):
        table.add_column(column, justify="right" if column else "left")
    for part in ("own_solutions", "rewritings"):
        for kind, result in [*everything[part]["kinds"].items(), (f"all {part}", everything[part])]:
            counts = (str(result["false_positives"]), str(result["false_negatives"]))
            table.add_row(kind, f"{result['items']:,}", percent(result["agreement"], 2), *counts)
    console.print(table)


def plot(figures: dict[str, Any], path: Path) -> None:
    """Draw the agreement on the labeled cases by kind, with a dot for each grader."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    graders = figures["graders"]
    results = {name: found["parts"]["cases"]["kinds"] for name, found in graders.items()}
    peers = [name for name in results if name != "ours"]
    kinds = sorted(results["ours"], key=lambda kind: sum(results[name][kind]["agreement"] or 0 for name in peers))
    figure, axes = pyplot.subplots(figsize=(8, 0.22 * len(kinds) + 2.2))
    markers = dict(zip(peers, "osD^v<>", strict=False))
    colors = dict(
        zip(peers, ("#d1495b", "#edae49", "#66a182", "#8d6a9f", "#b5b5b5", "#8c8c8c", "#5f5f5f"), strict=False)
    )
    for name in [*peers, "ours"]:
        total, boxed = (graders[name]["parts"][part]["agreement"] or 0 for part in ("cases", "boxed_cases"))
        style = {"color": "#1f6f8b", "s": 70, "zorder": 3} if name == "ours" else {"color": colors[name], "s": 20}
        if name != "ours":
            style["marker"] = markers[name]
        shares = [100 * (results[name][kind]["agreement"] or 0) for kind in kinds]
        axes.scatter(
            shares,
            range(len(kinds)),
            label=f"{LABELS[name]}: {100 * total:.0f} % (boxed ones {100 * boxed:.0f} %)",
            **style,
        )
    axes.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds], fontsize=8)
    axes.set_ylim(-1, len(kinds))
    axes.set_xlabel("agreement with the label, % of the cases of a kind")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.4, -0.08), ncols=2, frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
