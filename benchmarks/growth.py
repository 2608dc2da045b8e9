"""Measures growth with rows, files and classes: seconds and memory of each part, beside the usual implementation.

    python benchmarks/growth.py [--largest 10000000]

Each case runs in its own process, to measure its own peak memory. An exponent of 1 is linear growth. A case that
prepares something returns its own seconds.
"""

import argparse
import contextlib
import csv
import io
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import zlib
from collections import deque
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from common import machine
from overhead import head_step, ours
from PIL import Image
from torch import nn
from torchvision import datasets
from torchvision.transforms import v2

from datamodules import ImageFolders
from datamodules.files import Paths
from datamodules.folders import files_below, files_listed
from datamodules.orders import Order
from datamodules.splits import few_shots, split_rows
from tl_modules import Classification, ConvNet, FeatureExtraction
from tl_modules.cache.columns import Uniform
from tl_modules.cache.store import Store
from tl_modules.evaluation.drawing import confusion, save_figure
from tl_modules.evaluation.gather import Spool
from tl_modules.finetuning.audit import sums_of
from tl_modules.runs import GracefulShutdown
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


def listing_kept(files):
    """Reads the list of the same files, made by `find -L . -type f`."""
    root = tree(files)
    (root / "files.txt").write_text("\n".join(f"./{name}" for name in files_below(root)))
    start = time.perf_counter()
    files_listed(root / "files.txt")
    return time.perf_counter() - start


def paths(files):
    """Keeps the paths of a data set."""
    kept = Paths(f"/data/photos/train/class_{number % 1000}/{number}.jpg" for number in range(files))
    assert len(kept) == files


def paths_usual(files):
    """Keeps them as a list of texts."""
    kept = [f"/data/photos/train/class_{number % 1000}/{number}.jpg" for number in range(files)]
    assert len(kept) == files


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


def photos(count):
    """Makes two classes of photos of 500 x 375 pixels, once for each count."""
    root = Path(tempfile.gettempdir()) / f"photos-{count}"
    generator = np.random.default_rng(0)
    for number in range(0 if root.exists() else count):
        file = root / "train" / "ab"[number % 2] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        rough = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        rough.resize((500, 375), Image.Resampling.BICUBIC).save(file, quality=90)
    return root


CROP = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]
AUGMENTATIONS = {"none": [], "crop and flip": CROP, "jitter": [*CROP, v2.ColorJitter(0.4, 0.4, 0.4, 0.1)]}


def augmented(count, augment):
    """Reads photos with two workers, augmented at their own size; the seconds from the second batch on."""
    data = ImageFolders(photos(count), num_workers=2, batch_size=32, augment=AUGMENTATIONS[augment])
    batches = iter(data.train_dataloader())
    next(batches)
    start = time.perf_counter()
    deque(batches, maxlen=0)
    return time.perf_counter() - start


def augmented_usual(count, augment):
    """Does the same with torchvision's ImageFolder."""
    steps = AUGMENTATIONS[augment] or [v2.Resize(224), v2.CenterCrop(224)]
    images = datasets.ImageFolder(photos(count) / "train", v2.Compose([*steps, v2.PILToTensor()]))
    images.samples = images.samples[: round(0.8 * count)]  # as many as our training split
    batches = iter(torch.utils.data.DataLoader(images, 32, shuffle=True, num_workers=2))
    next(batches)
    start = time.perf_counter()
    deque(batches, maxlen=0)
    return time.perf_counter() - start


def figure(classes):
    """Draws the confusion matrix of 20,000 samples as a PNG."""
    generator = np.random.default_rng(0)
    pairs = {}
    for pair in generator.integers(0, classes, (20_000, 2)).tolist():
        pairs[tuple(pair)] = pairs.get(tuple(pair), 0) + 1
    with tempfile.TemporaryDirectory() as folder:
        save_figure(confusion(pairs, list(map(str, range(classes)))), Path(folder) / "confusion.png")


def batches(rows, classes, top_k=None):
    """Lines of `tl predict`, of 256 samples each, and the samples' numbers."""
    names = list(map(str, range(classes)))
    for numbers in torch.arange(rows).split(256):
        columns = class_columns(torch.rand(len(numbers), classes), names, top_k)
        yield list(zip(*columns.values(), strict=True)), numbers


def predictions(rows, classes=100, top_k=None):
    """The CSV of `tl predict`."""
    spool = Spool()
    for lines, numbers in batches(rows, classes, top_k):
        spool.add(lines, numbers)
    with tempfile.TemporaryFile("w") as file:
        for numbers, values in spool.blocks(SimpleNamespace(world_size=1)):
            csv.writer(file).writerows([number, *each] for number, each in zip(numbers, values, strict=True))


def predictions_usual(rows):
    """All rows in memory, then the file."""
    found = [
        (number, *line)
        for lines, numbers in batches(rows, 100)
        for number, line in zip(numbers.tolist(), lines, strict=True)
    ]
    with tempfile.TemporaryFile("w") as file:
        csv.writer(file).writerows(found)


def embeddings(rows):
    """What `tl embed` keeps of 512 features each, to the file."""
    spool = Spool()
    for numbers in torch.arange(rows).split(256):
        spool.add(torch.rand(len(numbers), 512), numbers)
    with tempfile.TemporaryFile() as file:
        found = np.memmap(file, np.float32, "w+", shape=(rows, 512))
        for numbers, values in spool.blocks(SimpleNamespace(world_size=1)):
            found[numbers[0] : numbers[-1] + 1] = values.numpy()


def embeddings_usual(rows):
    """All rows in memory, then the file."""
    found = torch.cat([torch.rand(len(numbers), 512) for numbers in torch.arange(rows).split(256)])
    with tempfile.TemporaryFile() as file:
        np.save(file, found.numpy())


def saves(parameters):
    """What is checked before a checkpoint is saved, after the first one."""
    module = Classification(ConvNet(), 2, finetuning=FeatureExtraction())
    module.stages()[0].more = nn.Parameter(torch.ones(parameters), requires_grad=False)
    shutdown, trainer = GracefulShutdown(Path("last.ckpt"), None, ""), SimpleNamespace(global_step=0)
    for _ in range(2):
        start = time.perf_counter()
        shutdown.on_save_checkpoint(trainer, module, {"state_dict": module.state_dict()})
    return time.perf_counter() - start


def saves_usual(parameters):
    """A search for nan in all weights."""
    weights = torch.ones(parameters)
    start = time.perf_counter()
    assert weights.isfinite().all()
    return time.perf_counter() - start


def cache_open(rows):
    """Opens a cache entry of 1,024 features each and reads a batch."""
    store, batch = _entry(rows)
    start = time.perf_counter()
    (mapped,) = store.open("0" * 32)
    Uniform(mapped.values, mapped.checksums).take(batch)
    return time.perf_counter() - start


def cache_open_usual(rows):
    """Reads the whole entry for one checksum."""
    _entry(rows)
    start = time.perf_counter()
    with (Path(tempfile.gettempdir()) / f"cache-{rows}" / ("0" * 32) / "0.bin").open("rb") as file:
        total = 0
        while part := file.read(1 << 26):
            total = zlib.crc32(part, total)
    return time.perf_counter() - start


def _entry(rows):
    store = Store(Path(tempfile.gettempdir()) / f"cache-{rows}", 10**12)
    if not store.has("0" * 32):
        (values,) = store.begin("0" * 32, "new", [((rows, 1024), torch.float32)])
        values.fill_(1)
        store.commit("0" * 32, "new", [values])
    return store, torch.randint(rows, (32,))


def cached_step(batch):
    """1,000 steps of `tl fit` on cached features, from their median."""
    file = Path(tempfile.gettempdir()) / "small.npz"
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (3200, 32, 32, 3), dtype=np.uint8), np.arange(3200) % 10
    np.savez(file, train_images=images, train_labels=labels, val_images=images[:32], val_labels=labels[:32])
    os.chdir(tempfile.gettempdir())
    sys.path.insert(0, str(Path(__file__).parent))
    with contextlib.redirect_stdout(io.StringIO()):
        return 1000 * ours(
            f"fit --data ImageArrays --data.target {file} --data.batch_size {batch} --model Classification "
            "--model.backbone ConvNet --model.finetuning FeatureExtraction --model.head torch.nn.Linear "
            "--model.lr_scheduler null --model.optimizer torch.optim.AdamW --model.optimizer.lr 1e-3 "
            f"--trainer.max_epochs {6 if batch < 100 else 30}"
        )


def cached_step_usual(batch):
    """A hand-written loop on features in memory."""
    return 1000 * head_step(torch.randn(3200, 128), torch.randint(10, (3200,)), batch, 1000)


def frozen_sums(parameters):
    """What the freeze audit reads of frozen parameters after each epoch."""
    sums_of({"stage_0": {"weight": torch.ones(parameters)}})


def frozen_sums_usual(parameters):
    """Comparing with a copy from before."""
    torch.equal(torch.ones(parameters), torch.ones(parameters))


FILES, MANY = [1000, 10_000, 100_000], [1_000_000, 10_000_000, 100_000_000]
CASES = {  # ours, the usual way, sizes
    "epoch start": (epoch_start, epoch_start_usual, "rows"),
    "whole epoch": (whole_epoch, whole_epoch_usual, "rows"),
    "splits": (splits, splits_usual, "rows"),
    "shots": (shots, shots_usual, [100, 1000, 10_000]),
    "listing": (listing, listing_usual, FILES),
    "listing kept": (listing_kept, listing_usual, FILES),
    "paths": (paths, paths_usual, [10_000, 100_000, 1_000_000]),
    **{
        f"augmentation {name}": (partial(augmented, augment=name), partial(augmented_usual, augment=name), [1000])
        for name in AUGMENTATIONS
    },
    "auroc": (auroc, auroc_usual, [100, 1000, 5000]),
    "predictions": (predictions, predictions_usual, FILES),
    "top 5": (partial(predictions, classes=1000, top_k=5), partial(predictions, classes=1000), [1000, 10_000]),
    "embeddings": (embeddings, embeddings_usual, FILES),
    "cached step": (cached_step, cached_step_usual, [32, 512]),
    "cache open": (cache_open, cache_open_usual, [10_000, 100_000, 1_000_000]),
    "saves": (saves, saves_usual, MANY),
    "frozen sums": (frozen_sums, frozen_sums_usual, MANY),
    "figure": (figure, None, [100, 1000, 5000]),
}


def measure(function, size, pipe):
    """Sends the seconds of a call, and the MiB that it needs above those of a small call before it."""
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in a process that was not spawned
    if function not in (cached_step, cached_step_usual):
        function(min(size, 10_000))  # imports
    if function in (listing, listing_usual):
        tree(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    seconds = function(size) or time.perf_counter() - start
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
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    given = parser.parse_args()
    if given.largest < 1_000_000:
        parser.error("--largest: a split of 1,000 classes takes 1,000,000 rows, of which a hundredth is the first case")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder  # of the processes
        show(given)


def show(given):
    """Prints the table."""
    print(f"{machine()}\n\n| what | size | s | MiB | exponent | usual, s | usual, MiB |\n|---|---|---|---|---|---|---|")
    for name in given.only:
        (function, usual, sizes), last = CASES[name], None
        for size in [given.largest // 100, given.largest // 10, given.largest] if sizes == "rows" else sizes:
            seconds, memory = apart(function, size)
            theirs = "{:.3g} | {:.0f}".format(*apart(usual, size)) if usual else " | "
            exponent = f"{math.log(seconds / last[1]) / math.log(size / last[0]):.1f}" if last else ""
            print(f"| {name} | {size:,} | {seconds:.3g} | {memory:.0f} | {exponent} | {theirs} |", flush=True)
            last = size, seconds


if __name__ == "__main__":
    main()
