"""Checks the defaults against fastai: `FeatureExtraction` and `FullFineTuning` with nothing else set.

Folders of images made from real data: photos of clothes (all, 30 of each of ten kinds, 120 of each of two), emoji (all
nine categories; 25 subcategories with 10 each), magnetic tiles, white blood cells, digits on photos (15 of each) and
playing cards (cut out of photos). SqueezeNet, MobileNetV1 and NanoDet's backbone. Same images, weights, size and
epochs; accuracy of the last epoch on the test split, so labels choose nothing.

python benchmarks/untuned.py --data $TL_DATA_DIR --out untuned.jsonl     # pip install fastai for its rows

Runs already in the file are not repeated; the table at the end covers all of them.
"""

import csv
import itertools
import json
import logging
import multiprocessing
import statistics
import tempfile
import time
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from common import rows_of, training_options
from defaults import BACKBONES, NanoDet
from lightning.pytorch import Trainer, seed_everything
from PIL import Image
from torch import nn

import tl_modules
from datamodules import ImageFolders
from tl_modules import Classification, TorchvisionBackbone
from tl_modules.cache import FeatureCache
from tl_modules.finetuning.optimizer import default_epochs

SIDE = 144  # of the files, in pixels; larger ones would only cost time
TEST = 600  # images of a test split at most
WAYS = ("FeatureExtraction", "FullFineTuning", "fastai frozen", "fastai fine_tune")


# Data: name -> [(image, label)] to be split, or by split


def clothing(root):
    found = {}
    for split, folder in (("train", "train"), ("val", "validation"), ("test", "test")):
        files = sorted((root / "clothing" / folder).glob("*/*.jpg"))
        found[split] = [(f, f.parent.name) for f in files]
    return found


def emoji(root, column="category"):
    with (root / "emoji/emoji.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    with np.load(root / "emoji/google_32.npz") as stored:
        drawn = stored[stored.files[0]]
    return {s: [(drawn[i], r[column]) for i, r in enumerate(rows) if r["split"] == s] for s in ("train", "val", "test")}


def subcategories(root):
    """Returns the 25 largest subcategories."""
    everything = [pair for part in emoji(root, "subcategory").values() for pair in part]
    names = [label for _, label in everything]
    largest = sorted(set(names), key=lambda name: (-names.count(name), name))[:25]
    return [pair for pair in everything if pair[1] in largest]


def tiles(root):
    return [(f, f.parent.name) for f in sorted((root / "magnetic_tile").glob("*/*.jpg"))]


def cells(root):
    with (root / "wbc_seg/labels.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["domain"] == "1"]
    return [(next((root / "wbc_seg/domain1").glob(f"{row['id']}.*")), row["class"]) for row in rows]


def digits(root):
    with np.load(root / "mnist/mnist_m_10k.npz") as stored:
        train = list(zip(stored["train_images"], stored["train_labels"].astype(str), strict=True))
        test = list(zip(stored["test_images"], stored["test_labels"].astype(str), strict=True))
    return {"train": train[:4000], "val": train[4000:], "test": test}


def cards(root):
    """Crops each box with a margin of a tenth; keeps the data's own split, since photos of a session are similar."""
    found = {}
    lists = root / "cards/ImageSets/Main"
    for split in ("train", "val", "test"):
        file = lists / f"{split}.txt"
        for name in file.read_text().split() if file.exists() else []:
            photo = Image.open(next((root / "cards/JPEGImages").glob(f"{name}.*"))).convert("RGB")
            for item in ElementTree.parse(root / f"cards/Annotations/{name}.xml").iter("object"):
                sides = ("xmin", "ymin", "xmax", "ymax")
                left, top, right, bottom = (float(item.find(f"bndbox/{side}").text) for side in sides)
                x, y = (right - left) / 10, (bottom - top) / 10
                crop = photo.crop((max(0, left - x), max(0, top - y), right + x, bottom + y))
                found.setdefault(split, []).append((np.array(crop), item.find("name").text))
    return found


# images of each class in training; None takes all
SETS = {
    "clothing": (clothing, None, None),
    "clothing 30": (clothing, 30, None),
    "shirts 120": (clothing, 120, ("shirt", "t-shirt")),
    "emoji": (emoji, None, None),
    "emoji 25 x 10": (subcategories, 10, None),
    "tiles": (tiles, None, None),
    "cells": (cells, None, None),
    "digits 15": (digits, 15, None),
    "cards 30": (cards, 30, None),
}


def split(pairs, random):
    """Splits each class: three tenths for testing and one for validation; one white blood cell has its own class."""
    found = {"train": [], "val": [], "test": []}
    for label in sorted({label for _, label in pairs}):
        own = [pair for pair in pairs if pair[1] == label]
        if len(own) < 10:
            continue
        own = [own[i] for i in random.permutation(len(own))]
        ends = -(-len(own) * 3 // 10), -(-len(own) * 4 // 10)
        found["test"] += own[: ends[0]]
        found["val"] += own[ends[0] : ends[1]]
        found["train"] += own[ends[1] :]
    return found


def save(image, path):
    """Resizes images to SIDE; small images are kept."""
    opened = (Image.open(image) if isinstance(image, Path) else Image.fromarray(image)).convert("RGB")
    scale = SIDE / min(opened.size)
    if scale < 1:
        size = [max(SIDE, round(side * scale)) for side in opened.size]
        opened = opened.resize(size, Image.Resampling.BILINEAR)
    path.parent.mkdir(parents=True, exist_ok=True)
    if scale > 2:
        opened.save(path.with_suffix(".png"))
    else:
        opened.save(path.with_suffix(".jpg"), quality=92)


def write(root, folder, names=tuple(SETS)):
    """Writes the sets as folders of images, train, val and test."""
    for name in names:
        read, count, classes = SETS[name]
        found, random = read(root), np.random.default_rng(0)
        if isinstance(found, list) or {"val", "test"} - found.keys():
            found = split(found if isinstance(found, list) else [p for part in found.values() for p in part], random)
        for part, pairs in found.items():
            pairs = [pair for pair in pairs if classes is None or pair[1] in classes]
            pairs = [pairs[i] for i in random.permutation(len(pairs))][: TEST if part == "test" else None]
            seen = Counter()
            for number, (image, label) in enumerate(pairs):
                seen[label] += 1
                if part == "test" or count is None or seen[label] <= count:
                    save(image, folder / name / part / label / f"{number:05}")


# Runs


def ours(tree, backbone, strategy, seed, size, epochs, **given):
    data = ImageFolders(tree, image_size=size, seed=seed, num_workers=0, **given)
    module = Classification(backbone, data.schema, finetuning=getattr(tl_modules, strategy)())
    loaders = data.train_dataloader().flattened
    trainer = Trainer(
        max_epochs=epochs or default_epochs([len(loader.dataset) for loader in loaders]),
        limit_val_batches=0,
        callbacks=[FeatureCache()],
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data)
    (result,) = trainer.test(module, data, verbose=False)
    return result["test/accuracy"]


class Spatial(nn.Module):
    """A backbone's last feature maps."""

    def __init__(self, backbone):
        super().__init__()
        self.net = backbone.model
        self.flipped = isinstance(backbone, NanoDet)

    def forward(self, x):
        net = self.net
        x = x.flip(1) if self.flipped else x
        if hasattr(net, "forward_features"):
            return net.forward_features(x)
        return net.features(x) if hasattr(net, "features") else net(x)


def fastai(tree, backbone, way, seed, size, epochs):
    """Trains as in fastai's tutorials: `vision_learner`, `aug_transforms`, then `fine_tune`, or one cycle if frozen."""
    from fastai.vision.all import (
        ImageDataLoaders,
        Learner,
        Normalize,
        Resize,
        accuracy,
        apply_init,
        aug_transforms,
        create_head,
        default_split,
        get_image_files,
        params,
    )  # fmt: skip
    from fastcore.foundation import L

    mean, std = [v.flatten().tolist() for v in (backbone.mean, backbone.std)]
    flipped = isinstance(backbone, NanoDet)
    stats = (mean[::-1], std[::-1]) if flipped else (mean, std)
    tfms = [*aug_transforms(), Normalize.from_stats(*stats, cuda=torch.cuda.is_available())]
    dls = ImageDataLoaders.from_folder(
        tree, train="train", valid="val", seed=seed, item_tfms=Resize(size), batch_tfms=tfms, num_workers=0
    )
    squeeze = isinstance(backbone, TorchvisionBackbone)
    body = backbone.model.features if squeeze else Spatial(backbone)
    model = nn.Sequential(body, create_head(backbone.out_features, dls.c))
    split = (lambda m: L(m[0][:5], m[0][5:], m[1:]).map(params)) if squeeze else default_split  # fastai's of SqueezeNet
    learn = Learner(dls, model, splitter=split, metrics=accuracy)
    learn.freeze()
    apply_init(model[1], nn.init.kaiming_normal_)
    with learn.no_bar(), learn.no_logging():
        if way == "fastai frozen":
            learn.fit_one_cycle(epochs)
        else:
            learn.fine_tune(epochs)
    files = get_image_files(Path(tree) / "test")
    loader = dls.test_dl(files, with_labels=True)
    with learn.no_bar(), learn.no_logging():
        predictions, labels = learn.get_preds(dl=loader)
    return float((predictions.argmax(1) == labels).float().mean())


def run(job):
    """Computes one row of the file."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "tl_modules"):
        logging.getLogger(name).setLevel(logging.ERROR)
    seed_everything(job["seed"], verbose=False)
    start = time.perf_counter()
    args = Path(job.pop("folder")) / job["data"], BACKBONES[job["backbone"]](Path(job.pop("root"))), job["way"]
    settings = {name: job[name] for name in ("seed", "size", "epochs")}
    found = (fastai if job["way"].startswith("fastai") else ours)(*args, **settings)
    return {**job, "accuracy": found, "seconds": round(time.perf_counter() - start, 1)}


def table(rows):
    """Prints means over seeds in Markdown, and the differences to fastai's better variant with their errors."""
    ways = dict.fromkeys(row["way"] for row in rows)
    print("| data, backbone | " + " | ".join(ways) + " |\n|" + " --- |" * (len(ways) + 1))
    means = {}
    for cell in dict.fromkeys((row["data"], row["backbone"]) for row in rows):
        texts = []
        for way in ways:
            found = [r["accuracy"] for r in rows if (r["data"], r["backbone"], r["way"]) == (*cell, way)]
            means[cell, way] = statistics.mean(found) if found else None
            texts.append("" if not found else f"{means[cell, way]:.3f}")
            texts[-1] += f" ({statistics.stdev(found):.3f})" if len(found) > 1 else ""
        print(f"| {', '.join(cell)} | " + " | ".join(texts) + " |")
    for mine, theirs in (("FeatureExtraction", "fastai frozen"), ("FullFineTuning", "fastai fine_tune")):
        differences = [
            means[cell, mine] - value
            for (cell, way), value in means.items()
            if way == theirs and value is not None and means.get((cell, mine)) is not None
        ]
        if len(differences) > 1:
            error = statistics.stdev(differences) / len(differences) ** 0.5
            mean, worst = statistics.mean(differences), min(differences)
            print(f"{mine} - {theirs}: {mean:+.3f} (se {error:.3f}), worst {worst:+.3f}")


def main():
    parser = training_options(__doc__, "untuned.jsonl", 3, 128)
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--backbones", nargs="*", default=list(BACKBONES))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), help="With --epochs 0 ours train as long as `tl fit`.")
    parser.add_argument("--jobs", type=int, default=1, help="Processes, one thread each.")
    args = parser.parse_args()
    rows = rows_of(args.out)
    with tempfile.TemporaryDirectory() as folder:
        write(args.data.resolve(), Path(folder), args.sets)
        settings = {"size": args.size, "epochs": args.epochs}
        jobs = [
            {"data": data, "backbone": backbone, "way": way, "seed": seed, **settings}
            for seed, data, backbone, way in itertools.product(range(args.seeds), args.sets, args.backbones, args.ways)
        ]
        jobs = [job for job in jobs if not any(job.items() <= row.items() for row in rows)]
        places = {"root": str(args.data.resolve()), "folder": folder}
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool, args.out.open("a") as file:
            for row in pool.imap(run, [job | places for job in jobs]):
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(row, flush=True)
    table(rows)


if __name__ == "__main__":
    main()
