"""`tl compare FILE.yaml`: ways x tasks x seeds, each trial a separate run, and statistics of the results.

FILE.yaml -> plan.py: trials -> runner.py: fit, test, result.json -> report.py: results.csv, tables, plot
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
import yaml

from tl_modules.cli.compare.plan import METRICS, default_metric, make_trials, read_plan, read_seeds
from tl_modules.cli.compare.report import report, table_rows
from tl_modules.cli.compare.runner import Main, Runner
from tl_modules.cli.compare.scores import LOWER_IS_BETTER, Scores
from tl_modules.errors import UserError, closest


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"compare: {message}; see `tl compare --help`")


def compare(args: Sequence[str], main: Main) -> None:
    """Runs `tl compare`.

    Args:
        args: The arguments after it.
        main: The `tl` command, which runs a trial's commands.

    Raises:
        UserError: The arguments or the file have a mistake.
        SystemExit: With 1 if a trial has failed, with 130 or 143 after a signal.
    """
    parser = _Parser(
        prog="tl compare",
        allow_abbrev=False,
        description="Runs the ways of FILE.yaml on its tasks and seeds, continues where it stopped, and reports.",
    )
    parser.add_argument("file", type=Path, metavar="FILE.yaml", help="name, config, options, seeds, tasks, ways, ...")
    parser.add_argument("--folder", type=Path, help="output folder; runs/NAME by default")
    parser.add_argument("--processes", type=int, help="concurrent runs; by default one per core, or one on a GPU")
    parser.add_argument("--seeds", help="instead of the file's, e.g. 0,1,2")
    parser.add_argument("--only", help="run only these ways and those they depend on: WAY,WAY")
    given = parser.parse_args(args)
    plan = read_plan(given.file)
    seeds = read_seeds(yaml.safe_load(f"[{given.seeds}]"), "--seeds") if given.seeds else plan.seeds
    only = _chosen(given.only, list(plan.ways)) if given.only else list(plan.ways)
    cores = os.cpu_count() or 1
    processes = given.processes if given.processes is not None else 1 if torch.accelerator.is_available() else cores
    if processes < 1:
        raise UserError(f"--processes: {processes} must be at least 1")
    folder = given.folder or Path("runs") / plan.name
    trials = make_trials(plan, folder, seeds)

    runner = Runner(trials, [key for key in trials if key[1] in only], processes, main)
    runner.run()

    rows = table_rows(trials.values())
    found = [row["metrics"] for row in rows if row["status"] == "done" and plan.ways[row["way"]].report]
    metric = plan.metric or default_metric(key for metrics in found for key in metrics)
    if found and metric is None:
        keys = dict.fromkeys(key for metrics in found for key in metrics if key.startswith("test/"))
        raise UserError(f"{given.file}: metric: name a metric to compare by; the runs have {', '.join(keys)}")
    metric = metric or METRICS[0]
    lower = metric.endswith(LOWER_IS_BETTER) if plan.lower_is_better is None else plan.lower_is_better
    there = {row["way"] for row in rows if row["status"] != "not run"} | {plan.baseline}
    ways = {name: way.metric or metric for name, way in plan.ways.items() if way.report and name in there}
    if ways:
        report(rows, Scores(rows, ways, plan.baseline, lower), folder, f"{plan.name}: {metric}")
        print(f"table: {folder / 'table.md'}\nplot: {folder / 'plot.png'}\ntensorboard --logdir {folder / 'runs'}")
    failed = sum(trials[key].current().get("status") != "done" for key in runner.graph)
    if failed:
        print(f"{failed} of {len(runner.graph)} trials failed; run the same command again to retry them")
        raise SystemExit(1)


def _chosen(words: str, ways: list[str]) -> list[str]:
    """Splits WAY,WAY; a name may contain a comma, and the longest matching name is taken."""
    found, parts = [], words.split(",")
    while parts:
        fitting = (count for count in range(len(parts), 0, -1) if ",".join(parts[:count]).strip() in ways)
        if not (count := next(fitting, 0)):
            name = parts[0].strip()
            raise UserError(f"--only: there is no way {name}{closest(name, ways)}; there are {', '.join(ways)}")
        found.append(",".join(parts[:count]).strip())
        parts = parts[count:]
    return found
