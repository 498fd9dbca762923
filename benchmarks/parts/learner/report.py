"""The tables and the plot of `benchmarks/learner.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

OURS = "slipstream"
PRODUCTS = "matrix products alone"


def show(figures: dict[str, Any], console: Console) -> None:
    for case in figures["cases"]:
        shortest, longest = case["lengths"]
        title = f"{case['num_sequences']} sequences of {shortest} to {longest} tokens, {case['num_threads']} thread(s)"
        table = Table(title=title)
        for column in ("", "tokens/s", "spread", f"{OURS} is", "of the matmul rate", "peak MB"):
            table.add_column(column, justify="left" if not column else "right")
        ours = case["rates"][OURS]["tokens_per_second"]
        for label, found in case["rates"].items():
            low, high = found["spread"]
            middle = found["tokens_per_second"]
            # No share for the products of the linear layers: they leave attention out, so it would be too high.
            share = "" if label == PRODUCTS else f"{100 * found['share_of_matmul']:.0f} %"
            cells = (f"{middle:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{ours / middle:.2f} x", share)
            table.add_row(label, *cells, f"{found['peak_mb']:,.0f}")
        for label, reason in case["skipped"].items():
            table.add_row(label, f"skipped: {reason}")
        console.print(table)
    table = Table(title="our step by number and length of sequences, one thread")
    for column in ("sequences", "tokens each", "tokens/s", "peak MB"):
        table.add_column(column, justify="right")
    for row in figures["growth"]:
        cells = row["num_sequences"], row["length"], f"{row['tokens_per_second']:,.0f}", f"{row['peak_mb']:,.0f}"
        table.add_row(*map(str, cells))
    console.print(table)
    head = figures["head"]
    table = Table(title=f"the head, vocabulary {head['vocabulary']:,}, float32")
    for column in ("", "tokens", "peak MB", "s of processor time"):
        table.add_column(column, justify="left" if not column else "right")
    for way, sizes in head["measured"].items():
        for tokens, found in sizes.items():
            table.add_row(way, f"{int(tokens):,}", f"{found['peak_mb']:,.0f}", f"{found['cpu_seconds']:.2f}")
    table.add_row("naive, extrapolated", f"{head['num_tokens']:,}", f"{head['naive_mb_extrapolated']:,.0f}")
    console.print(table, f"{head['times_less']:.0f} times less memory at {head['num_tokens']:,} tokens")


def plot(figures: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "slipstream"
    cases = [case for case in figures["cases"] if case["num_threads"] == 1]
    figure, axes = pyplot.subplots(1, len(cases) + 1, figsize=(4 * len(cases) + 4, 3.2))
    for case, axis in zip(cases, axes, strict=False):
        labels = list(reversed(case["rates"]))
        found = [case["rates"][label] for label in labels]
        middles = [rate["tokens_per_second"] for rate in found]
        errors = [[m - f["spread"][0] for m, f in zip(middles, found, strict=True)]]
        errors.append([f["spread"][1] - m for m, f in zip(middles, found, strict=True)])
        axis.barh(labels, middles, xerr=errors, color=["#1f6f8b" if x == OURS else "#b8b8b8" for x in labels])
        axis.set_title("{} to {} tokens".format(*case["lengths"]))
        axis.set_xlabel("tokens/s, one thread")
        axis.tick_params(labelleft=axis is axes[0])
    for way, color in (("naive", "#b8b8b8"), ("ours", "#1f6f8b")):
        sizes = figures["head"]["measured"][way]
        tokens = [int(size) for size in sizes]
        label = OURS if way == "ours" else way
        axes[-1].plot(tokens, [f["peak_mb"] for f in sizes.values()], "o-", color=color, label=label)
    head = figures["head"]
    line = [(max(map(int, head["measured"]["naive"])), head["num_tokens"])]
    start = list(head["measured"]["naive"].values())[-1]["peak_mb"]
    axes[-1].plot(line[0], (start, head["naive_mb_extrapolated"]), ":", color="#b8b8b8")
    axes[-1].set(xscale="log", yscale="log", xlabel="scored tokens", ylabel="MB", title="head, peak memory")
    axes[-1].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
