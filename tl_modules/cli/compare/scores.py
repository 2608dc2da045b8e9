"""Statistics over all trials: means, intervals, ranks, tests against the baseline, choices without labels."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from tl_modules.evaluation.criteria import CRITERIA

LOWER_IS_BETTER = ("rmse", "mae", "loss")
CRITERION_METRICS = tuple(f"val/target_{name}" for name in CRITERIA)
# columns of `benchmark`, and their format in the table
COSTS = {"parameters": ",.0f", "macs": ",.0f", "p50_ms": ".2f", "megabytes": ".3f"}
BY_LABELS = ("val/target_few", "val/target_oracle")  # criteria that use labels of the target


def interval(numbers: Sequence[float]) -> tuple[float | None, float | None]:
    """Computes the 95 % confidence interval of the mean by Student's t; (None, None) for fewer than two numbers."""
    from scipy.stats import t  # type: ignore[import-untyped]

    if len(numbers) < 2:
        return None, None
    half = float(t.ppf(0.975, len(numbers) - 1)) * _error(numbers)
    return statistics.fmean(numbers) - half, statistics.fmean(numbers) + half


def p_value(numbers: Sequence[float]) -> float:
    """Computes the two-sided p of the t test that the mean is 0; 1 if there is no variance to test.

    The same difference in every seed is not evidence: it results from a way that ignores the seed, or by chance from
    few test samples, with few possible values of the accuracy.
    """
    from scipy.stats import t

    if max(numbers) - min(numbers) <= 1e-3 * max(map(abs, numbers)):  # float32 rounding is not variance either
        return 1.0
    return 2 * float(t.sf(abs(statistics.fmean(numbers)) / _error(numbers), len(numbers) - 1))


def _error(numbers: Sequence[float]) -> float:
    """Computes the standard error of the mean."""
    return statistics.stdev(numbers) / math.sqrt(len(numbers))


def _mean(numbers: Iterable[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return statistics.fmean(known) if known else None


@dataclass(frozen=True)
class Choice:
    """A criterion's choice on one task with one seed.

    Attributes:
        seed: The seed.
        values: The task's metric, by candidate.
        way: The candidate with the criterion's best score.
        oracle: The best of the values.
    """

    seed: int
    values: dict[str, float]
    way: str
    oracle: float

    @property
    def value(self) -> float:
        """The metric of the chosen candidate."""
        return self.values[self.way]


class Scores:
    """Statistics over all trials.

    Args:
        rows: One per trial: task, way, seed, status, metrics, cpu_seconds.
        metrics: The metric to compare, by way.
        baseline: The way that negative transfer is measured against.
        lower: Whether lower is better.

    Attributes:
        values: Way -> (task, seed) -> the metric, if there is one.
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

    def by_seed(self, way: str, task: str | None = None) -> dict[int, float]:
        """Returns a way's values on a task by seed; without a task its mean over tasks, for seeds that have all."""
        mine, tasks = self.values[way], self.tasks if task is None else [task]
        whole = [seed for seed in self.seeds if all((task, seed) in mine for task in tasks)]
        return {seed: statistics.fmean(mine[task, seed] for task in tasks) for seed in whole}

    def ranks(self) -> dict[str, float]:
        """Returns each way's mean rank, 1 is best, over the (task, seed) where it and another have a value; ties share.

        A way with missing trials is ranked over fewer of them, and the others are ranked among fewer where it is
        missing.
        """
        from scipy.stats import rankdata

        sign = 1 if self.lower else -1
        ranks: dict[str, list[float]] = {}
        for task_seed in product(self.tasks, self.seeds):
            there = {way: sign * few[task_seed] for way, few in self.values.items() if task_seed in few}
            if len(there) > 1:
                for way, rank in zip(there, rankdata(list(there.values())), strict=True):
                    ranks.setdefault(way, []).append(float(rank))
        return {way: statistics.fmean(mine) for way, mine in ranks.items()}

    def differences(self, way: str, task: str | None = None) -> list[float]:
        """Returns a way's values minus the baseline's, by seed: on a task, or of the means over all tasks.

        The seeds are the sample, so tasks are averaged within each seed. A seed in which either way lacks a task is
        left out of the means, which would otherwise be over different tasks.
        """
        if self.baseline is None or way == self.baseline:
            return []
        mine, base = self.by_seed(way, task), self.by_seed(self.baseline, task)
        return [mine[seed] - base[seed] for seed in mine if seed in base]

    def transfer(self) -> dict[str, str]:
        """Describes for each way whether it is worse than the baseline, on average or else on which tasks.

        A paired two-sided t test over seeds decides, for each way on average and, if there are several tasks, on each;
        Holm's correction over all of them keeps the chance of any false alarm in the table below 5 %. A single seed
        cannot be tested.
        """
        tasks = [None, *self.tasks] if len(self.tasks) > 1 else [None]
        numbers = {(way, task): self.differences(way, task) for way in self.values for task in tasks}
        p = {test: p_value(few) for test, few in numbers.items() if len(few) > 1}
        worse = set()
        for passed, test in enumerate(sorted(p, key=p.__getitem__)):
            if p[test] > 0.05 / (len(p) - passed):
                break
            if (statistics.fmean(numbers[test]) > 0) == self.lower:
                worse.add(test)

        def text(way: str) -> str:
            on = [task for task in self.tasks if (way, task) in worse]
            if (way, None) in worse:
                return f"worse than {self.baseline}"
            return f"worse than {self.baseline} on {', '.join(on)}" if on else ""

        return {way: text(way) for way in self.values}

    def choices(self) -> dict[str, list[Choice]]:
        """Returns what each criterion without target labels would choose, if it has several candidates.

        A candidate is a way whose training hid the target's labels and left the criterion's score in metrics.json.
        Tests of another way's run and ways trained on the target's labels have no score, and ways whose epoch was
        chosen by `few` or `oracle` are left out. A score that is not finite never wins; among equal scores the first
        way does. A criterion favours a way that trains on it, as `infomax` favours SHOT.
        """
        scores: dict[str, dict[tuple[str, int], dict[str, float]]] = {}
        for row in self.rows:
            way, task_seed, metrics = row["way"], (row["task"], row["seed"]), row["metrics"]
            if task_seed not in self.values[way] or str(metrics.get("chosen_by")).startswith(BY_LABELS):
                continue
            for key, score in metrics.items():
                if key in CRITERION_METRICS or key.startswith("val/source_"):
                    known = score is not None and math.isfinite(score)
                    higher = (-score if self._is_loss(key) else score) if known else -math.inf
                    scores.setdefault(key, {}).setdefault(task_seed, {})[way] = higher
        choices: dict[str, list[Choice]] = {}
        for key, by_task_seed in scores.items():
            for task_seed, candidates in by_task_seed.items():
                best = max(candidates, key=candidates.__getitem__)
                if len(candidates) > 1 and candidates[best] > -math.inf:
                    values = {way: self.values[way][task_seed] for way in candidates}
                    oracle = (min if self.lower else max)(values.values())
                    name = key.removeprefix("val/").removeprefix("target_")
                    choices.setdefault(name, []).append(Choice(task_seed[1], values, best, oracle))
        return choices

    def _is_loss(self, key: str) -> bool:
        """Returns whether lower is better for a criterion."""
        metric = key.removeprefix("val/source_")
        return self.lower if f"test/{metric}" in self.metrics.values() else metric.endswith(LOWER_IS_BETTER)

    def choice_table(self) -> list[dict[str, Any]]:
        """Returns a row of numbers per criterion, over all (task, seed) in which it has a choice.

        "mean" and "std" (over seeds) are of the metric of its choice, "oracle" of the best candidate, "regret" the mean
        difference between the two, and "WAY chosen" counts how often it would choose that way.
        """
        choices = self.choices()
        ways = [way for way in self.metrics if any(way in one.values for found in choices.values() for one in found)]
        table = []
        for criterion, found in choices.items():
            seeds = [[one.value for one in found if one.seed == seed] for seed in self.seeds]
            means = [statistics.fmean(few) for few in seeds if few]
            row: dict[str, Any] = {"criterion": criterion}
            row["mean"] = statistics.fmean(one.value for one in found)
            row["std"] = statistics.stdev(means) if len(means) > 1 else None
            row["oracle"] = statistics.fmean(one.oracle for one in found)
            row["regret"] = abs(row["oracle"] - row["mean"])
            row["choices"] = len(found)
            table.append(row | {f"{way} chosen": _times(way, found) for way in ways})
        return table

    def table(self) -> list[dict[str, Any]]:
        """Returns a row of numbers per way; None where there is none."""
        ranks, transfer, infomax = self.ranks(), self.transfer(), self.choices().get("infomax", [])
        table = []
        for way, metric in self.metrics.items():
            mine = [row for row in self.rows if row["way"] == way]
            done = [row["metrics"] for row in mine if row["status"] == "done"]
            row: dict[str, Any] = {"way": way}
            for task in self.tasks:
                numbers = list(self.by_seed(way, task).values())
                row[f"{task} mean".strip()] = _mean(numbers)
                row[f"{task} std".strip()] = statistics.stdev(numbers) if len(numbers) > 1 else None
            means = list(self.by_seed(way).values())
            row["mean"] = _mean(means)
            row["low"], row["high"] = interval(means)
            row["rank"] = ranks.get(way)
            seconds = _mean(few["cpu_seconds"] for few in mine)
            row["cpu_minutes"] = None if seconds is None else seconds / 60
            if self.baseline is not None:
                numbers = self.differences(way)
                row["difference"] = _mean(numbers)
                row["difference low"], row["difference high"] = interval(numbers)
                row["difference seeds"] = len(numbers) or None
                row["negative transfer"] = transfer[way]
            row["oracle"] = _mean(few.get(metric.replace("test/", "test/oracle/", 1)) for few in done)
            row["gap"] = _mean(few.get("test/oracle_gap") for few in done)
            times = _times(way, infomax)
            row["chosen by infomax"] = None if times is None else f"{times} of {len(infomax)}"
            row |= {cost: _mean(few.get(f"cost/{cost}") for few in done) for cost in COSTS}
            row["missing"] = len(mine) - len(self.values[way])
            table.append(row)
        for column in ("oracle", "gap", "chosen by infomax", *COSTS):
            if all(row[column] is None for row in table):
                for row in table:
                    del row[column]
        return table

    def front(self, cost: str) -> list[str]:
        """Returns the Pareto front: ways that no other way beats at the same cost or less, the cheapest first."""
        known = [row for row in self.table() if row["mean"] is not None and row.get(cost) is not None]
        sign = 1 if self.lower else -1
        front: list[str] = []
        best = math.inf
        for row in sorted(known, key=lambda row: (row[cost], sign * row["mean"])):
            if sign * row["mean"] < best:
                best = sign * row["mean"]
                front.append(row["way"])
        return front

    def texts(self) -> list[dict[str, str]]:
        """Returns the table as texts."""
        return [self._texts(row) for row in self.table()]

    def _texts(self, row: dict[str, Any]) -> dict[str, str]:
        texts = {"way": row["way"]}
        for task in self.tasks:
            texts[task or "mean (std)"] = _spread(*(row[f"{task} {what}".strip()] for what in ("mean", "std")))
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
        texts |= {cost: _number(row[cost], form) for cost, form in COSTS.items() if cost in row}
        if "chosen by infomax" in row:
            texts["chosen by infomax"] = row["chosen by infomax"] or ""
        if self._incomplete():
            texts["missing"] = str(row["missing"] or "")
        return texts

    def choice_texts(self) -> list[dict[str, str]]:
        """Returns the choices as texts."""
        return [self._choice_texts(row) for row in self.choice_table()]

    def _choice_texts(self, row: dict[str, Any]) -> dict[str, str]:
        chosen = {way: row.get(f"{way} chosen") for way in self.metrics}
        return {
            "criterion": row["criterion"],
            "mean (std)": _spread(row["mean"], row["std"]),
            "regret": _number(row["regret"]),
            "chosen": ", ".join(f"{way} {times} of {row['choices']}" for way, times in chosen.items() if times),
        }

    def _incomplete(self) -> bool:
        return any(len(few) < len(self.tasks) * len(self.seeds) for few in self.values.values())

    def caption(self) -> str:
        """Explains the columns about the baseline; empty without one."""
        if self.baseline is None:
            return ""
        unit = "at most " * self._incomplete() + count(self.seeds, "seed")
        unit += f", mean of {len(self.tasks)} tasks" if len(self.tasks) > 1 else ""
        return (
            f"against {self.baseline}: difference paired by seed ({unit}) and its 95 % interval; "
            "negative transfer: paired t test over seeds, 5 % for the whole table (Holm)"
        )


def _times(way: str, choices: Sequence[Choice]) -> int | None:
    """Returns how often a way is chosen, None if it is never a candidate."""
    return sum(one.way == way for one in choices) if any(way in one.values for one in choices) else None


def _number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def _spread(mean: float | None, std: float | None) -> str:
    return _number(mean) if std is None else f"{_number(mean)} ({_number(std)})"


def _range(low: float | None, high: float | None, form: str = ".3f") -> str:
    return "" if low is None else f"{_number(low, form)} to {_number(high, form)}"


def count(things: Sequence[Any], name: str) -> str:
    """Counts things in words: `3 seeds`."""
    return f"{len(things)} {name}{'s' * (len(things) > 1)}"
