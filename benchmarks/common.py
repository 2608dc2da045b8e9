"""Shared parts of the benchmarks: the machine's name, timed commands and steps, a table of ratios."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback

from tl_modules.evaluation import machine as machine_of

STEPS = []
TL = [sys.executable, "-m", "tl_modules"]


def timed(command, folder, environment=None):
    """Returns the seconds that a command takes, and its output."""
    start = time.perf_counter()
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - start, done.stdout


def machine():
    """Returns the name of this machine's processor."""
    return machine_of(torch.device("cpu"))


def report(rows, out=None):
    """Prints the median of each side of a case and of their ratio over the pairs, and writes all as JSON.

    Args:
        rows: Dicts with `case`, `ours`, `theirs` (in one unit) and `wanted` (a text).
        out: A file, or None.
    """
    print(f"\n{machine()}\n\n| case | ours | theirs | theirs / ours, median | wanted |\n|---|---|---|---|---|")
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        ours, theirs = (statistics.median(row[side] for row in own) for side in ("ours", "theirs"))
        ratio = statistics.median(row["theirs"] / row["ours"] for row in own)
        print(f"| {case} | {ours:.4g} | {theirs:.4g} | {ratio:.2f} | {own[0]['wanted']} |")
    if out:
        Path(out).write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def training_options(description, out, seeds, size):
    """Returns a parser with the options of a benchmark that trains on real data."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("TL_DATA_DIR"))
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--size", type=int, default=size, help="Of the images, in pixels.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def rows_of(file):
    """Returns the JSON lines already in a file, whose runs need not be repeated."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


class Leave(Callback):
    """Ends the process when the first step begins."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        os._exit(0)


class Clock(Callback):
    """Measures the time between the beginnings of two steps of an epoch."""

    def __init__(self):
        self.last = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        now = time.perf_counter()
        if self.last is not None and batch_idx > 0:
            STEPS.append(now - self.last)
        self.last = now
