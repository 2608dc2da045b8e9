"""Compares our adaptation methods, by their defaults, with another library on the same frozen features.

FEATURES/PAIR/{source_train,target_train,target_test}.npz hold `features` (N, D) and `labels` (N,). A run is 1,000
iterations of 32 + 32 samples with only the method set, and the last iteration counts; the target's labels are used
only for the accuracy on target_test. Every run has one thread; runs already in the file are not repeated.

python benchmarks/adaptation.py FEATURES --reference results.jsonl --out adaptation.jsonl --jobs 4

A line of the reference has `key` (setting, method, pair, seed) and `acc`.
"""

import argparse
import csv
import itertools
import json
import logging
import multiprocessing
import os
import statistics
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything

import tl_modules
from datamodules import TabularData
from tl_modules import Classification, TabularMLP
from tl_modules.finetuning.optimizer import ROWS

# ours: the method's name in the reference
METHODS = {
    "source only": "erm",
    "DANN": "dann",
    "CDAN": "cdan",
    "MDD": "mdd",
    "MCC": "mcc",
    "JAN": "jan",
    "DAN": "dan_scaled",
    "AFN": "afn",
    "ADDA": "adda",
    "PADA": None,
    "OSBP": None,
    "MCD": None,
    "BNM": None,
    "SHOT": None,
    "CORAL": None,
    "SWD": None,
    "DeepJDOT": None,
    "InfoMax": None,
    "EntropyMinimization": None,
}
STEPS, BATCH = 1000, 32


def write(features, folder):
    """Writes the pairs as `tl embed` does; nothing is validated, so validation rows are copies of other splits."""
    for pair in (path for path in sorted(features.iterdir()) if path.is_dir()):
        for domain, splits in (("source", ("train",)), ("target", ("train", "test"))):
            out = folder / pair.name / domain
            out.mkdir(parents=True)
            rows, values = [], []
            for split in splits:
                with np.load(pair / f"{domain}_{split}.npz") as file:
                    first, labels = sum(map(len, values)), file["labels"].tolist()
                    values.append(file["features"].astype(np.float32))
                names = (split, "val") if split == splits[-1] else (split,)
                for name, (row, label) in itertools.product(names, enumerate(labels, first)):
                    rows.append([row, domain, name, f"{split}/{row}", label])
            np.save(out / "features.npy", np.concatenate(values))
            with (out / "index.csv").open("w", newline="") as file:
                csv.writer(file).writerows([["row", "domain", "split", "id", "label"], *rows])


def fit(pair, name, seed, steps, weights=None):
    """Trains on a pair; returns trainer, module and data."""
    seed_everything(seed, verbose=False)
    alone = name == "source only"
    source = {} if name == "SHOT" else {"source": pair / "source"}
    hidden = {"target_unseen": True} if alone else {"target_labels": False}
    with (pair / "source/index.csv").open() as file:
        classes = [str(c) for c in sorted({int(row["label"]) for row in csv.DictReader(file)})]
    if name == "OSBP":
        classes.append("unknown")
    data = TabularData(pair / "target", **source, **hidden, classes=classes, batch_size=BATCH, seed=seed)
    methods = [] if alone else [getattr(tl_modules, name)()]
    # the defaults of `tl fit` for rows
    options = {"head": torch.nn.Linear, "optimizer": partial(torch.optim.SGD, **ROWS)}
    module = Classification(TabularMLP(weights=weights), data.schema, methods=methods, **options)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = Trainer(max_steps=steps, accelerator="cpu", limit_val_batches=0, enable_checkpointing=False, **quiet)
    trainer.fit(module, data)
    return trainer, module, data


def run(job):
    """Runs one job in its own process; returns its line."""
    folder, name, pair, seed, steps = job
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "tl_modules", "datamodules"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    weights = None
    if name in ("SHOT", "ADDA"):  # these start from a run on the source
        trainer, *_ = fit(folder / pair, "source only", seed, steps)
        weights = Path(tempfile.mkdtemp(dir=folder)) / "source.ckpt"
        trainer.save_checkpoint(weights)
    _, module, data = fit(folder / pair, name, seed, steps, weights)
    module.eval()
    with torch.no_grad():
        hits = [module(x).argmax(1) == y for batch in data.test_dataloader() for x, y, _ in batch.values()]
    return {"key": ["defaults", name, pair, seed], "acc": float(torch.cat(hits).float().mean())}


def means(rows, setting, name, pairs):
    """Returns the mean over the pairs in %, one value per seed that has all pairs; and each pair's mean."""
    found = {}
    for row in rows:
        if row["key"][:2] == [setting, name]:
            found.setdefault(row["key"][3], {})[row["key"][2]] = 100 * row["acc"]
    whole = {seed: statistics.mean(by[p] for p in pairs) for seed, by in found.items() if set(pairs) <= by.keys()}
    each = {p: statistics.mean(v) for p in pairs if (v := [by[p] for by in found.values() if p in by])}
    return whole, each


def table(rows, reference, pairs):
    """Prints the mean over the pairs (standard deviation over the seeds), in Markdown."""

    def cell(whole):
        if not whole:
            return ""
        spread = f" ({statistics.stdev(whole.values()):.1f})" if len(whole) > 1 else ""
        return f"{statistics.mean(whole.values()):.1f}{spread}"

    print("| method | ours | reference | difference | " + " | ".join(pairs) + " |\n|" + " --- |" * (4 + len(pairs)))
    for name, other in METHODS.items():
        ours, each = means(rows, "defaults", name, pairs)
        theirs, of_each = means(reference, "common", other, pairs)
        gain = f"{statistics.mean(ours.values()) - statistics.mean(theirs.values()):+.1f}" if ours and theirs else ""
        if each:
            both = [[f"{m[p]:.1f}" if p in m else "" for m in (each, of_each)] for p in pairs]
            cells = [f"{mine} ({other})" if other else mine for mine, other in both]
            print(f"| {name} | {cell(ours)} | {cell(theirs)} | {gain} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path)
    parser.add_argument("--reference", type=Path, help="the other library's results")
    parser.add_argument("--out", type=Path, default=Path("adaptation.jsonl"))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--pairs", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"

    def read(path):
        return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []

    pairs = args.pairs or sorted(path.name for path in args.features.iterdir() if path.is_dir())
    done = {tuple(row["key"]) for row in read(args.out)}
    with tempfile.TemporaryDirectory() as name, args.out.open("a") as file:
        folder = Path(name)
        write(args.features, folder)
        wanted = itertools.product(range(args.seeds), args.methods, pairs)
        jobs = [(folder, m, p, s, args.steps) for s, m, p in wanted if ("defaults", m, p, s) not in done]
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            for row in pool.imap_unordered(run, jobs):
                print(json.dumps(row), file=file, flush=True)
    table(read(args.out), read(args.reference), pairs)


if __name__ == "__main__":
    main()
