"""What the cells' numbers say together: results.csv, table.csv, table.md and plot.png."""

from __future__ import annotations

import csv
import io
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tl_modules.compare.plan import Cell
from tl_modules.runs import write_whole

PANELS = 6  # of the plot; with more tasks it shows their mean


def table_rows(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """A row per cell, of results.csv."""
    rows = []
    for cell in cells:
        found = cell.current()
        rows.append(
            {
                "task": cell.key[0],
                "way": cell.key[1],
                "seed": cell.key[2],
                "status": found.get("status", "not run"),
                "metrics": found.get("metrics", {}),
                "seconds": found.get("seconds"),
                "cpu_seconds": found.get("cpu_seconds"),
                "error": found.get("error"),
            }
        )
    return rows


def interval(numbers: Sequence[float]) -> tuple[float | None, float | None]:
    """The 95 % confidence interval of the mean by Student's t; of fewer than two numbers there is none."""
    from scipy.stats import t  # type: ignore[import-untyped]

    if len(numbers) < 2:
        return None, None
    half = float(t.ppf(0.975, len(numbers) - 1)) * statistics.stdev(numbers) / math.sqrt(len(numbers))
    return statistics.mean(numbers) - half, statistics.mean(numbers) + half


def _mean(numbers: Iterable[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return statistics.mean(known) if known else None


class Scores:
    """What the cells' numbers say together.

    Args:
        rows: One per cell: task, way, seed, status, metrics, cpu_seconds.
        metrics: The key in `metrics` that counts, by way.
        baseline: The way that negative transfer is measured against.
        lower: Whether lower is better.

    Attributes:
        values: Way -> (task, seed) -> the metric, where there is one.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        metrics: Mapping[str, str],
        baseline: str | None = None,
        lower: bool = False,
    ) -> None:
        self.rows = [row for row in rows if row["way"] in metrics]
        self.metrics = metrics
        self.baseline = baseline
        self.lower = lower
        self.tasks = list(dict.fromkeys(row["task"] for row in self.rows))
        self.seeds = list(dict.fromkeys(row["seed"] for row in self.rows))
        self.values: dict[str, dict[tuple[str, int], float]] = {way: {} for way in metrics}
        for row in self.rows:
            value = row["metrics"].get(metrics[row["way"]])
            if row["status"] == "done" and value is not None and math.isfinite(value):
                self.values[row["way"]][row["task"], row["seed"]] = value

    def of_task(self, way: str, task: str) -> list[float]:
        """A way's values on a task, by seed."""
        return [value for (where, _), value in self.values[way].items() if where == task]

    def of_seeds(self, way: str) -> list[float]:
        """A way's mean over the tasks, of each seed that has them all."""
        mine = self.values[way]
        seeds = [[mine[task, seed] for task in self.tasks if (task, seed) in mine] for seed in self.seeds]
        return [statistics.mean(few) for few in seeds if len(few) == len(self.tasks)]

    def ranks(self) -> dict[str, float]:
        """Each way's mean rank, 1 is best, over the (task, seed) where all ways have a value; ties share theirs."""
        from scipy.stats import rankdata

        places = [p for p in next(iter(self.values.values()), {}) if all(p in few for few in self.values.values())]
        if not places:
            return {}
        sign = 1 if self.lower else -1
        ranks = [rankdata([sign * few[place] for few in self.values.values()]) for place in places]
        return {
            way: float(statistics.mean(column))
            for way, column in zip(self.values, zip(*ranks, strict=True), strict=True)
        }

    def differences(self, way: str, tasks: Sequence[str] | None = None) -> list[float]:
        """A way's value minus the baseline's, of each (task, seed) that both have; of all tasks, or of some."""
        if self.baseline is None or way == self.baseline:
            return []
        base, wanted = self.values[self.baseline], self.tasks if tasks is None else tasks
        return [v - base[place] for place, v in self.values[way].items() if place in base and place[0] in wanted]

    def transfer(self, way: str) -> str:
        """Whether a way is worse than the baseline, in all (surely, if the whole interval is) or on which tasks."""
        sign = -1 if self.lower else 1

        def worse(tasks: Sequence[str]) -> bool:
            numbers = self.differences(way, tasks)
            return bool(numbers) and sign * statistics.mean(numbers) < 0

        if worse(self.tasks):
            ends = [sign * end for end in interval(self.differences(way)) if end is not None]
            return f"{'surely ' * bool(ends and max(ends) < 0)}worse than {self.baseline}"
        found = [task for task in self.tasks if worse([task])]
        return f"worse than {self.baseline} on {', '.join(found)}" if found else ""

    def table(self) -> list[dict[str, Any]]:
        """A row of numbers per way; None where there is none."""
        ranks = self.ranks()
        table = []
        for way, metric in self.metrics.items():
            mine = [row for row in self.rows if row["way"] == way]
            done = [row["metrics"] for row in mine if row["status"] == "done"]
            row: dict[str, Any] = {"way": way}
            for task in self.tasks:
                numbers = self.of_task(way, task)
                row[f"{task} mean".strip()] = _mean(numbers)
                row[f"{task} std".strip()] = statistics.stdev(numbers) if len(numbers) > 1 else None
            row["mean"] = _mean(self.of_seeds(way))
            row["low"], row["high"] = interval(self.of_seeds(way))
            row["rank"] = ranks.get(way)
            seconds = _mean(few["cpu_seconds"] for few in mine)
            row["cpu_minutes"] = None if seconds is None else seconds / 60
            if self.baseline is not None:
                numbers = self.differences(way)
                row["difference"] = _mean(numbers)
                row["difference low"], row["difference high"] = interval(numbers)
                row["negative transfer"] = self.transfer(way)
            row["oracle"] = _mean(few.get(metric.replace("test/", "test/oracle/", 1)) for few in done)
            row["gap"] = _mean(few.get("test/oracle_gap") for few in done)
            row["missing"] = len(mine) - len(self.values[way])
            table.append(row)
        for column in ("oracle", "gap"):
            if all(row[column] is None for row in table):
                for row in table:
                    del row[column]
        return table

    def texts(self) -> list[dict[str, str]]:
        """The same for reading."""
        return [self._texts(row) for row in self.table()]

    def _texts(self, row: dict[str, Any]) -> dict[str, str]:
        texts = {"way": row["way"]}
        for task in self.tasks:
            mean, std = (_number(row[f"{task} {what}".strip()]) for what in ("mean", "std"))
            texts[task or "mean (std)"] = f"{mean} ({std})" if std else mean
        if len(self.tasks) > 1:
            texts["mean"] = _number(row["mean"])
        texts["95 % interval"] = _range(row["low"], row["high"])
        texts["rank"] = _number(row["rank"], ".2f")
        texts["CPU min"] = _number(row["cpu_minutes"], ".2f")
        if self.baseline is not None:
            between = _range(row["difference low"], row["difference high"], "+.3f")
            texts[f"against {self.baseline}"] = _number(row["difference"], "+.3f") + (
                f" ({between})" if between else ""
            )
            texts["negative transfer"] = row["negative transfer"]
        texts |= {column: _number(row[column]) for column in ("oracle", "gap") if column in row}
        if any(len(few) < len(self.tasks) * len(self.seeds) for few in self.values.values()):
            texts["missing"] = str(row["missing"] or "")
        return texts


def _number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def _range(low: float | None, high: float | None, form: str = ".3f") -> str:
    return "" if low is None else f"{_number(low, form)} to {_number(high, form)}"


def report(rows: list[dict[str, Any]], scores: Scores, folder: Path, title: str) -> None:
    """Writes results.csv, table.csv, table.md and plot.png, and prints the table."""
    metrics = dict.fromkeys(key for row in rows for key in row["metrics"])
    flat = [
        {key: row[key] for key in ("task", "way", "seed", "status")}
        | {key: row["metrics"].get(key) for key in metrics}
        | {key: row[key] for key in ("seconds", "cpu_seconds", "error")}
        for row in rows
    ]
    for name, content in (("results.csv", flat), ("table.csv", scores.table())):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(content[0]))
        writer.writeheader()
        writer.writerows(content)
        write_whole(folder / name, text.getvalue())
    texts = scores.texts()
    lines = [list(texts[0]), ["---"] * len(texts[0]), *(list(row.values()) for row in texts)]
    write_whole(folder / "table.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))
    plot(scores, folder / "plot.png", title)
    seeds = f"mean (std) of {len(scores.seeds)} seed{'s' * (len(scores.seeds) > 1)}"
    table = Table(title=f"{title}, {seeds}", title_justify="left")
    for column in texts[0]:
        table.add_column(column, justify="left" if column in ("way", "negative transfer") else "right")
    for row in texts:
        table.add_row(*row.values())
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def plot(scores: Scores, file: Path, title: str) -> None:
    """A panel per task: each way's mean with its interval, a dot per seed, the baseline in grey."""
    from matplotlib.figure import Figure

    ways = list(scores.metrics)
    panels: dict[str, Callable[[str], list[float]]] = {
        task: lambda way, task=task: scores.of_task(way, task)  # type: ignore[misc]
        for task in scores.tasks
    }
    if len(panels) > PANELS:
        panels = {f"mean of {len(panels)} tasks": scores.of_seeds}
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(2.5 + 4.5 * across, down * (1.4 + 0.36 * len(ways))), layout="constrained")
    colours = ["#999999" if way == scores.baseline else "#3b7dd8" for way in ways]
    for number, (name, numbers_of) in enumerate(panels.items()):
        axes = figure.add_subplot(down, across, number + 1)
        for height, way in enumerate(ways):
            numbers = numbers_of(way)
            if not numbers:
                continue
            mean, (low, _) = statistics.mean(numbers), interval(numbers)
            axes.barh(height, mean, xerr=None if low is None else mean - low, color=colours[height], capsize=3)
            axes.plot(numbers, [height] * len(numbers), "k.", markersize=4)
        axes.set_yticks(range(len(ways)), ways if number % across == 0 else [""] * len(ways))
        axes.set_ylim(len(ways) - 0.5, -0.5)
        axes.set_title(name, fontsize=10)
    figure.suptitle(f"{title}\nlines: 95 % interval of the mean, dots: seeds", fontsize=10)
    figure.savefig(file, dpi=120)
