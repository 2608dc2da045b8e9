"""Compares the order of `tl rank` with that of fine-tuning: weighted Kendall tau of each score and the test accuracy.

Ten backbones, four of them random, on clothing, emoji, magnetic tiles and white blood cells, 30 images per class.
Accuracies are those of the defaults of `FullFineTuning` and `FeatureExtraction`, with the epoch chosen on the
validation split; scores use only the training images.

python benchmarks/rank.py --data $TL_DATA_DIR --out rank.jsonl

Runs already in the file are not repeated; the table at the end covers all of them.
"""

import csv
import itertools
import json
import logging
import statistics
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from common import rows_of, training_options
from defaults import MobileNet, NanoDet, fit, square, squeezenet, write
from lightning.pytorch import Trainer, seed_everything
from PIL import Image
from scipy.stats import weightedtau

from datamodules import Digits, ImageArrays
from tl_modules import Classification, ConvNet, ImageBackbone
from tl_modules.cli.rank import SCORES, measured

SETS = ("clothing", "emoji", "tiles", "cells")
STRATEGIES = ("FeatureExtraction", "FullFineTuning")
SHOTS = 30  # images per class, or all if a class has fewer


def untrained(backbone):
    """Returns the same network with new weights."""
    for module in backbone.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    backbone.random = True
    return backbone


def beginning(backbone, layers):
    """Returns a pretrained network without its last stages."""
    mean, std = backbone.mean.flatten().tolist(), backbone.std.flatten().tolist()
    with torch.no_grad():
        width = layers.eval()(torch.zeros(1, 3, 64, 64)).shape[1]
    return ImageBackbone(layers, width, mean, std)


def digits():
    """Returns a small network trained on scanned digits."""
    backbone = ConvNet()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    data = Digits()
    Trainer(max_epochs=10, enable_checkpointing=False, **quiet).fit(Classification(backbone, data.schema), data)
    backbone.random = False
    return backbone


def backbones(root):
    """Returns name -> builder."""
    squeeze, nano = squeezenet(root), NanoDet(root)
    return {
        "SqueezeNet": lambda: squeezenet(root),
        "MobileNetV1": lambda: MobileNet(root),
        "NanoDet": lambda: NanoDet(root),
        "SqueezeNet, first half": lambda: beginning(squeeze, squeezenet(root).model.features[:7]),
        "NanoDet, 3 of 4 stages": lambda: beginning(nano, NanoDet(root).model[:3]),
        "ConvNet of digits": digits,
        "SqueezeNet, random": lambda: untrained(squeezenet(root)),
        "MobileNetV1, random": lambda: untrained(MobileNet(root)),
        "NanoDet, random": lambda: untrained(NanoDet(root)),
        "ConvNet, random": ConvNet,
    }


def write_cells(root, folder, size):
    """Writes white blood cells of five kinds, split at random."""
    with (root / "wbc_seg/labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    images = [square(Image.open(root / f"wbc_seg/domain{row['domain']}/{row['id']}.jpg"), size) for row in rows]
    labels = np.array([int(row["class"]) - 1 for row in rows])
    random = np.random.default_rng(0)
    parts = {"test": [], "val": [], "train": []}
    for kind in np.unique(labels):
        own = random.permutation(np.flatnonzero(labels == kind))
        for split, part in zip(parts, np.split(own, [len(own) * 3 // 10, len(own) * 4 // 10]), strict=True):
            parts[split] += part.tolist()
    (folder / "cells").mkdir()
    for split, part in parts.items():
        np.save(folder / f"cells/{split}_images.npy", np.stack([images[i] for i in part]))
        np.save(folder / f"cells/{split}_labels.npy", labels[part])


def shots(folder, name):
    """Takes at most `SHOTS` training images of each class."""
    labels = np.load(folder / name / "train_labels.npy")
    random = np.random.default_rng(0)
    kept = np.concatenate([random.permutation(np.flatnonzero(labels == c))[:SHOTS] for c in np.unique(labels)])
    for part in ("images", "labels"):
        file = folder / name / f"train_{part}.npy"
        np.save(file, np.load(file)[np.sort(kept)])


def table(rows):
    """Prints the tau of each score on each data set, in Markdown."""
    for strategy in STRATEGIES:
        print(f"\nweighted Kendall tau with the test accuracy of `{strategy}`\n")
        print("| score | " + " | ".join([*SETS, "mean"]) + " |\n|" + " --- |" * (len(SETS) + 2))
        for score in [name for name in SCORES if any(name in row for row in rows)]:
            taus = []
            for name in SETS:
                own = [row for row in rows if row["data"] == name and score in row and strategy in row]
                means = [
                    [
                        statistics.mean(row[key] for row in own if row["backbone"] == backbone)
                        for key in (score, strategy)
                    ]
                    for backbone in dict.fromkeys(row["backbone"] for row in own)
                ]
                taus.append(weightedtau(*zip(*means, strict=True)).statistic if len(means) > 1 else float("nan"))
            print(f"| {score} | " + " | ".join(f"{tau:.2f}" for tau in [*taus, statistics.mean(taus)]) + " |")


def main():
    args = training_options(__doc__, "rank.jsonl", 1, 64).parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    root = args.data.resolve()
    rows = rows_of(args.out)
    with tempfile.TemporaryDirectory() as folder:
        write(root, Path(folder), args.size)
        write_cells(root, Path(folder), args.size)
        for name in SETS:
            shots(Path(folder), name)
        for seed, name, (backbone, build) in itertools.product(range(args.seeds), SETS, backbones(root).items()):
            row = {"data": name, "backbone": backbone, "seed": seed}
            if any(row.items() <= done.items() for done in rows):
                continue
            data = ImageArrays(Path(folder) / name, seed=seed)
            for strategy in STRATEGIES:
                seed_everything(seed, verbose=False)
                row[strategy] = fit(build(), data, strategy, seed, args.epochs)
            seed_everything(seed, verbose=False)
            found = measured(build(), None, data)
            row |= {score: found[score] for score in SCORES if score in found}
            rows.append(row)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
    table(rows)


if __name__ == "__main__":
    main()
