"""Measures growth with rows, files and classes: seconds and memory of each part, beside the usual implementation.

    python benchmarks/growth.py [--largest 10000000]

Each case runs in its own process, to measure its own peak memory. An exponent of 1 is linear growth.
"""

import argparse
import csv
import math
import multiprocessing
import os
import resource
import tempfile
import time
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from common import machine

from datamodules.folders import files_below
from datamodules.orders import Order
from datamodules.splits import few_shots, split_rows
from tl_modules.evaluation.drawing import confusion, save_figure
from tl_modules.evaluation.gather import Spool
from tl_modules.finetuning.audit import sums_of
from tl_modules.tasks.auroc import MacroAUROC
from tl_modules.tasks.classification import class_columns


def epoch_start(rows):
    """Computes the first 4,096 indices of an epoch."""
    Order(rows, 0, "target", 0)[:4096]


def epoch_start_usual(rows):
    """Does the same as torch's DistributedSampler: all indices as a list."""
    iter(torch.randperm(rows).tolist())


def whole_epoch(rows):
    """Computes all indices of an epoch, block by block."""
    order = Order(rows, 0, "target", 0)
    for first in range(0, rows, 4096):
        order[first : first + 4096].tolist()


def whole_epoch_usual(rows):
    """Does the same as torch's DistributedSampler."""
    for _ in torch.randperm(rows).tolist():
        pass


def splits(rows):
    """Splits 1,000 classes into train, validation and test."""
    split_rows(np.arange(rows) % 1000, (0.1, 0.2), 0)


def splits_usual(rows):
    """Does the same with scikit-learn, twice."""
    from sklearn.model_selection import train_test_split

    labels = np.arange(rows) % 1000
    rest, _ = train_test_split(np.arange(rows), test_size=0.2, stratify=labels, random_state=0)
    train_test_split(rest, test_size=0.125, stratify=labels[rest], random_state=0)


class Labels:
    """A data set that consists only of labels."""

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)


def shots(classes):
    """Draws five samples of each class from a million rows."""
    few_shots(Labels(np.arange(1_000_000) % classes), 5, list(map(str, range(classes))), 0)


def shots_usual(classes):
    """Does the same with a search for each class."""
    labels = np.arange(1_000_000) % classes
    for number in range(classes):
        np.random.default_rng(0).choice(np.flatnonzero(labels == number), 5, replace=False)


def listing(files):
    """Lists the files of a tree of folders with 1,000 files each."""
    sum(1 for _ in files_below(tree(files)))


def listing_usual(files):
    """Does the same with Path.rglob."""
    sum(path.is_file() for path in tree(files).rglob("*"))


def tree(files):
    """Makes a folder of empty files, once for each count, in this benchmark's temporary folder."""
    root = Path(tempfile.gettempdir()) / f"growth-{files}"
    for number in range(0 if root.exists() else files):
        folder = root / f"{number // 1000:05}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").touch()
    return root


def scores(classes):
    """Makes probabilities and labels of 2,048 samples."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2048, classes, generator=generator), torch.randint(classes, (2048,), generator=generator)


def auroc(classes):
    """Computes the exact AUROC of 2,048 samples."""
    metric = MacroAUROC(classes)
    metric.update(*scores(classes))
    metric.compute()


def auroc_usual(classes):
    """Computes it as torchmetrics with 200 thresholds."""
    from torchmetrics.classification import MulticlassAUROC

    metric = MulticlassAUROC(classes, thresholds=200)
    metric.update(*scores(classes))
    metric.compute()


def figure(classes):
    """Draws the confusion matrix of 20,000 samples as a PNG."""
    generator = np.random.default_rng(0)
    pairs = {}
    for pair in generator.integers(0, classes, (20_000, 2)).tolist():
        pairs[tuple(pair)] = pairs.get(tuple(pair), 0) + 1
    with tempfile.TemporaryDirectory() as folder:
        save_figure(confusion(pairs, list(map(str, range(classes)))), Path(folder) / "confusion.png")


def batches(rows):
    """Columns of `tl predict` for 100 classes, of 256 samples each."""
    names = list(map(str, range(100)))
    for numbers in torch.arange(rows).split(256):
        yield class_columns(torch.rand(len(numbers), 100), names), numbers


def predictions(rows):
    """The CSV of `tl predict` for 100 classes."""
    spool = Spool()
    for columns, numbers in batches(rows):
        spool.add(list(zip(*columns.values(), strict=True)), numbers)
    with tempfile.TemporaryFile("w") as file:
        for numbers, values in spool.blocks(SimpleNamespace(world_size=1)):
            csv.writer(file).writerows([number, *each] for number, each in zip(numbers, values, strict=True))


def predictions_usual(rows):
    """All rows in memory, then the file."""
    found = [list(zip(numbers.tolist(), *columns.values(), strict=True)) for columns, numbers in batches(rows)]
    with tempfile.TemporaryFile("w") as file:
        csv.writer(file).writerows(chain.from_iterable(found))


def frozen_sums(parameters):
    """What the freeze audit reads of frozen parameters after each epoch."""
    sums_of({"stage_0": {"weight": torch.ones(parameters)}})


def frozen_sums_usual(parameters):
    """Comparing with a copy from before."""
    torch.equal(torch.ones(parameters), torch.ones(parameters))


CASES = {
    epoch_start: (epoch_start_usual, "rows"),
    whole_epoch: (whole_epoch_usual, "rows"),
    splits: (splits_usual, "rows"),
    shots: (shots_usual, [100, 1000, 10_000]),
    listing: (listing_usual, [1000, 10_000, 100_000]),
    auroc: (auroc_usual, [100, 1000, 5000]),
    predictions: (predictions_usual, [1000, 10_000, 100_000]),
    frozen_sums: (frozen_sums_usual, [1_000_000, 10_000_000, 100_000_000]),
    figure: (None, [100, 1000, 5000]),
}


def measure(function, size, pipe):
    """Sends the seconds of a call, and the MiB that it needs above those of a small call before it."""
    function(min(size, 10_000))  # imports
    if function in (listing, listing_usual):
        tree(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    function(size)
    seconds = time.perf_counter() - start
    pipe.send((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def apart(function, size):
    """Measures in a separate process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=measure, args=(function, size, there))
    process.start()
    there.close()  # so that a process that fails ends this one
    found = here.recv()
    process.join()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=10_000_000, help="rows, at least 1,000,000")
    parser.add_argument("--only", nargs="*", default=[function.__name__ for function in CASES])
    given = parser.parse_args()
    if given.largest < 1_000_000:
        parser.error("--largest: a split of 1,000 classes takes 1,000,000 rows, of which a hundredth is the first case")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder  # of the processes
        show(given)


def show(given):
    """Prints the table."""
    print(f"{machine()}\n\n| what | size | s | MiB | exponent | usual, s | usual, MiB |\n|---|---|---|---|---|---|---|")
    for function, (usual, sizes) in CASES.items():
        if function.__name__ not in given.only:
            continue
        last = None
        for size in [given.largest // 100, given.largest // 10, given.largest] if sizes == "rows" else sizes:
            seconds, memory = apart(function, size)
            theirs = "{:.3g} | {:.0f}".format(*apart(usual, size)) if usual else " | "
            exponent = f"{math.log(seconds / last[1]) / math.log(size / last[0]):.1f}" if last else ""
            name = function.__name__.replace("_", " ")
            print(f"| {name} | {size:,} | {seconds:.3g} | {memory:.0f} | {exponent} | {theirs} |", flush=True)
            last = size, seconds


if __name__ == "__main__":
    main()
