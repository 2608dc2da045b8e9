"""`make demo`: is a pretrained model worth it? Five ways to train on ten labelled images a class, three seeds each.

    source: scanned digits --pretrain--> ConvNet --transfer--> target: digits on photographs, 10 images a class

Everything goes through the `tl` command, as a user's own runs would.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tl_modules.cli import main as tl

EPOCHS = 30
WAYS = {
    "from scratch": "--model.finetuning Full",
    "frozen": "--model.finetuning FeatureExtraction --model.backbone.weights {source}",
    "last stages": "--model.finetuning LastStages --model.finetuning.k 1 --model.backbone.weights {source}",
    "gradual": "--model.finetuning GradualUnfreezing --model.finetuning.every 5 --model.backbone.weights {source}",
    "full": "--model.finetuning Full --model.backbone.weights {source}",
}


def run(lines: list[str]) -> None:
    """Runs `tl` commands one after the other, silently."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        for line in lines:
            try:
                tl(line.split())
            except SystemExit as stop:
                raise RuntimeError(f"tl {line}: {errors.getvalue()}") from stop


def jobs(folder: Path, seed: int) -> dict[str, list[str]]:
    """The command lines of each way for one seed, which draws the shots, the start weights and the order."""
    common = f"--seed_everything {seed} --data Digits --data.seed {seed} --trainer.default_root_dir {folder} "
    common += "--trainer.precision 32-true"  # so that its table is the same on every machine
    affine = "--data.augment+=torchvision.transforms.v2.RandomAffine --data.augment.degrees 10"
    model = "--model Classification --model.backbone ConvNet --model.backbone.width 16"
    source = place(folder, "source", seed)
    lines = {
        "source": [
            f"fit {common} {model} --name {source.parent.name} --data.source true --data.target false {affine} "
            f"--trainer.max_epochs {EPOCHS}"
        ]
    }
    for way, options in WAYS.items():
        run_at = place(folder, way, seed)
        lines[way] = [
            f"fit {common} {model} {options.format(source=source)} --name {run_at.parent.name} "
            f"--data.shots_per_class 10 --trainer.max_epochs {EPOCHS}",
            f"test --run {run_at}",
        ]
    return lines


def place(folder: Path, way: str, seed: int) -> Path:
    """The run directory of a way and seed."""
    return folder / "runs" / f"{way.replace(' ', '_')}-{seed}" / "version_0"


def accuracies(folder: Path, seeds: int) -> dict[str, list[float]]:
    """Test accuracy on the target by way and seed; small networks train best one to a core."""
    lines = [jobs(folder, seed) for seed in range(seeds)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(8, os.cpu_count() or 1), context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for way, few in (("source", ["source"]), ("target", list(WAYS))):
            todo = [pool.submit(run, each[name]) for each in lines for name in few]
            text = "pretraining on the source" if way == "source" else "training on the target"
            for done in track(as_completed(todo), text, total=len(todo)):
                done.result()

    def accuracy(way: str, seed: int) -> float:
        metrics = json.loads((place(folder, way, seed) / "metrics.json").read_text())
        return float(metrics["test/accuracy"])

    return {way: [accuracy(way, seed) for seed in range(seeds)] for way in WAYS}


def show(found: dict[str, list[float]], folder: Path) -> None:
    """Prints the table and saves it as a CSV and a plot."""
    from matplotlib.figure import Figure

    table = Table(title="Test accuracy on digits on photographs, 10 labelled images a class", title_justify="left")
    for column in ("way", "mean", "spread (std)", *(f"seed {seed}" for seed in range(len(found["full"])))):
        table.add_column(column, justify="left" if column == "way" else "right")
    means = {way: statistics.mean(values) for way, values in found.items()}
    spreads = {way: statistics.stdev(values) if len(values) > 1 else 0.0 for way, values in found.items()}
    for way, values in found.items():
        table.add_row(way, *(f"{value:.3f}" for value in (means[way], spreads[way], *values)))
    Console().print(table)
    with (folder / "demo.csv").open("w", newline="") as file:
        rows = [[way, means[way], spreads[way], *values] for way, values in found.items()]
        csv.writer(file).writerows([["way", "mean", "std", *range(len(found["full"]))], *rows])

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    colours = ["#999999", *["#3b7dd8"] * (len(found) - 1)]
    axes.barh(list(found), list(means.values()), xerr=list(spreads.values()), color=colours, capsize=3)
    for height, values in enumerate(found.values()):
        axes.plot(values, [height] * len(values), "k.", markersize=4)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel=f"test accuracy, {len(found['full'])} seeds: mean, std, each")
    axes.set_title("10 labelled images a class: transfer against training from scratch", fontsize=10)
    figure.savefig(folder / "demo.png", dpi=120)


def main() -> None:
    """Trains, tests, shows."""
    parser = argparse.ArgumentParser(prog="python -m tl_modules.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=None, help="where to; a new folder below runs/ by default")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    folder: Path = args.folder or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True, exist_ok=True)
    show(accuracies(folder, args.seeds), folder)
    print(f"plot: {folder / 'demo.png'}\ncurves, mistakes, features: .venv/bin/tensorboard --logdir {folder / 'runs'}")


if __name__ == "__main__":
    main()
