"""Writes and prints the results of a comparison: results.csv, table.csv, table.md, choice.csv and the plots."""

from __future__ import annotations

import csv
import io
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tl_modules.checkpoints.files import write_whole
from tl_modules.cli.compare.plan import Trial
from tl_modules.cli.compare.scores import Scores, count, interval
from tl_modules.evaluation.drawing import save_figure

WORDS = ("way", "negative transfer", "criterion", "chosen")  # columns of text
PANELS = 6  # of the plot; with more tasks the mean is shown
PIXELS = 12_000  # on a plot's longer side


def table_rows(trials: Iterable[Trial]) -> list[dict[str, Any]]:
    """Returns the rows of results.csv, one per trial."""
    missing: dict[str, Any] = {"status": "not run", "metrics": {}, "seconds": None, "cpu_seconds": None, "error": None}
    return [
        dict(zip(("task", "way", "seed"), trial.key, strict=True))
        | {key: found.get(key, nothing) for key, nothing in missing.items()}
        for trial in trials
        for found in [trial.current()]
    ]


def report(rows: list[dict[str, Any]], scores: Scores, folder: Path, title: str) -> None:
    """Writes results.csv, table.csv, table.md, plot.png and, if there is a choice, choice.csv; prints the tables."""
    metrics = dict.fromkeys(key for row in rows for key in row["metrics"])
    flat = [
        {key: row[key] for key in ("task", "way", "seed", "status")}
        | {key: row["metrics"].get(key) for key in metrics}
        | {key: row[key] for key in ("seconds", "cpu_seconds", "error")}
        for row in rows
    ]
    for name, content in (("results", flat), ("table", scores.table()), ("choice", scores.choice_table())):
        _write_csv(folder / f"{name}.csv", content)
    texts, caption = scores.texts(), scores.caption()
    lines = [list(texts[0]), ["---"] * len(texts[0]), *(list(row.values()) for row in texts)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_whole(folder / "table.md", table + (f"\n{caption}\n" if caption else ""))
    plot(scores, folder / "plot.png", title)
    if any("p50_ms" in row for row in scores.table()):
        plot_fronts(scores, folder / "pareto.png", title)
    _print(f"{title}, mean (std) of {count(scores.seeds, 'seed')}", texts, caption)
    _print(
        f"{title}, chosen by criteria without target labels",
        scores.choice_texts(),
        "regret: gap to the best of the same ways by the target's test labels, mean over tasks and seeds",
    )


def _write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as CSV; without rows it removes an earlier file."""
    if not rows:
        return file.unlink(missing_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(file, text.getvalue())


def _print(title: str, rows: list[dict[str, str]], caption: str) -> None:
    """Prints a table, unless it has no rows."""
    if not rows:
        return
    table = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if column in WORDS else "right")
    for row in rows:
        table.add_row(*row.values())
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def plot(scores: Scores, file: Path, title: str) -> None:
    """Draws a panel per task: each way's mean with its interval, a dot per seed, the baseline in grey."""
    from matplotlib.figure import Figure

    ways = list(scores.metrics)
    panels: dict[str, str | None] = {task: task for task in scores.tasks}
    if len(panels) > PANELS:
        panels = {f"mean of {len(panels)} tasks": None}
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(2.5 + 4.5 * across, down * (1.4 + 0.36 * len(ways))), layout="constrained")
    colours = ["#999999" if way == scores.baseline else "#3b7dd8" for way in ways]
    for number, (name, task) in enumerate(panels.items()):
        axes = figure.add_subplot(down, across, number + 1)
        for height, way in enumerate(ways):
            numbers = list(scores.by_seed(way, task).values())
            if not numbers:
                continue
            mean, (low, _) = statistics.fmean(numbers), interval(numbers)
            axes.barh(height, mean, xerr=None if low is None else mean - low, color=colours[height], capsize=3)
            axes.plot(numbers, [height] * len(numbers), "k.", markersize=4)
        axes.set_yticks(range(len(ways)), ways if number % across == 0 else [""] * len(ways))
        axes.set_ylim(len(ways) - 0.5, -0.5)
        axes.set_title(name, fontsize=10)
    figure.suptitle(f"{title}\nlines: 95 % interval of the mean, dots: seeds", fontsize=10)
    save_figure(figure, file, dpi=min(120, PIXELS / max(figure.get_size_inches())))


def plot_fronts(scores: Scores, file: Path, title: str) -> None:
    """Draws a panel per cost: each way's mean metric over its cost, and a line through the Pareto front."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    rows = {row["way"]: row for row in scores.table() if row["mean"] is not None}
    for number, (cost, name) in enumerate({"p50_ms": "p50 latency, ms", "megabytes": "weights, MB"}.items()):
        axes = figure.add_subplot(1, 2, number + 1)
        there = {way: row for way, row in rows.items() if row.get(cost) is not None}
        front = [there[way] for way in scores.front(cost)]
        axes.step([row[cost] for row in front], [row["mean"] for row in front], where="post", color="#3b7dd8")
        for position, (way, row) in enumerate(there.items()):
            axes.plot(row[cost], row["mean"], "o", color="#3b7dd8" if row in front else "#999999")
            axes.annotate(f"{position + 1}", (row[cost], row["mean"]), (4, 4), textcoords="offset points", fontsize=8)
            axes.plot([], [], " ", label=f"{position + 1}  {way}")
        axes.set_xscale("log")
        axes.set_xlabel(name)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right upper", handlelength=0)
    figure.suptitle(f"{title}; line: Pareto front", fontsize=10)
    save_figure(figure, file, dpi=120)
