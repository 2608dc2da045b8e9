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
import statistics
import time
from pathlib import Path

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


def run(line: str) -> None:
    """Runs one `tl` command silently."""
    with contextlib.redirect_stdout(io.StringIO()):
        tl(line.split())


def accuracies(folder: Path, seeds: int) -> dict[str, list[float]]:
    """Test accuracy on the target by way and seed.

    Args:
        folder: Where the runs go.
        seeds: How many times each way is run; a seed draws the shots, the start weights and the order.
    """
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    plan = [(seed, way) for seed in range(seeds) for way in ("source", *WAYS)]
    for seed, way in track(plan, "training", console=Console(), transient=True):
        common = f"--seed_everything {seed} --data Digits --data.seed {seed} --trainer.default_root_dir {folder}"
        name = f"{way.replace(' ', '_')}-{seed}"
        place = folder / "runs" / name / "version_0"
        if way == "source":
            augment = "--data.augment+=torchvision.transforms.v2.RandomAffine --data.augment.degrees 10"
            source = place
            run(f"fit {common} --name {name} --data.source true --data.target false --trainer.max_epochs 15 {augment}")
            continue
        options = WAYS[way].format(source=source)
        run(f"fit {common} --name {name} --data.shots_per_class 10 --trainer.max_epochs {EPOCHS} {options}")
        run(f"test --run {place}")
        found[way].append(json.loads((place / "metrics.json").read_text())["test/accuracy"])
    return found


def show(found: dict[str, list[float]], folder: Path) -> None:
    """Prints the table and saves it as a CSV and a plot."""
    from matplotlib.figure import Figure

    table = Table(title="Test accuracy on digits on photographs, 10 labelled images a class", title_justify="left")
    for column in ("way", "mean", "spread (std)", *(f"seed {seed}" for seed in range(len(found["full"])))):
        table.add_column(column, justify="left" if column == "way" else "right")
    rows = []
    for way, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append([way, statistics.mean(values), spread, *values])
        table.add_row(way, *(f"{value:.3f}" for value in rows[-1][1:]))  # type: ignore[str-bytes-safe]
    Console().print(table)
    with (folder / "demo.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["way", "mean", "std", *range(len(found["full"]))], *rows])

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    names, means, spreads = ([row[i] for row in rows] for i in range(3))
    axes.barh(names, means, xerr=spreads, color=["#999999", *["#3b7dd8"] * (len(rows) - 1)], capsize=3)
    for place, values in enumerate(found.values()):
        axes.plot(values, [place] * len(values), "k.", markersize=4)
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
