"""Measures the cost of exactness: epochs with the audit, checksummed atomic files and exact sampling, and without.

    python benchmarks/exact_cost.py [--data DIR_WITH_clothing_AND_weights] [--pairs 30] [--only clothing] [--json FILE]

An epoch consists of training, validation and checkpoint. "Without" is plain Lightning: DataLoader(shuffle=True), its
checkpoint files, no audit, no interruption handling. A single process alternates epoch by epoch, since two processes
differ by more than the measured effect.
"""

import argparse
import contextlib
import io
import json
import logging
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from datamodules import Digits, ImageFolders
from datamodules.loaders import collate
from tl_modules import Classification, ConvNet, FeatureExtraction, FullFineTuning, TorchvisionBackbone
from tl_modules.checkpoints.files import AtomicCheckpointIO
from tl_modules.finetuning.audit import FreezeAudit
from tl_modules.runs import ExactResume, GracefulShutdown

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
HOOKS = ("on_train_epoch_start", "on_train_batch_start", "on_before_backward", "on_before_optimizer_step",
         "on_train_batch_end", "on_train_epoch_end", "on_save_checkpoint")  # fmt: skip


class Turns(Callback):
    """Runs the exact callbacks in every other epoch, and times all epochs."""

    def __init__(self, exact):
        self.exact, self.on, self.starts = exact, False, []

    def on_train_start(self, trainer, pl_module):
        for callback in self.exact:
            callback.on_train_start(trainer, pl_module)

    def on_train_end(self, trainer, pl_module):
        self.starts.append(time.perf_counter())
        for callback in self.exact:
            callback.on_train_end(trainer, pl_module)


def _hook(name):
    def run(self, trainer, *args):
        if name == "on_train_epoch_start":
            self.on = trainer.current_epoch % 2 == 1
            self.starts.append(time.perf_counter())
        if self.on:
            for callback in self.exact:
                getattr(callback, name)(trainer, *args)

    return run


for hook in HOOKS:
    setattr(Turns, hook, _hook(hook))


class Files(AtomicCheckpointIO):
    """Writes our checkpoint files in one epoch, Lightning's in the next."""

    def __init__(self, turns):
        self.turns = turns

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        writer = super() if self.turns.on else TorchCheckpointIO()
        writer.save_checkpoint(checkpoint, path)


class Batches:
    """Uses our loader in one epoch, an ordinary one in the next."""

    def __init__(self, turns, exact):
        self.turns, self.exact, self.sampler, self.batch_size = turns, exact, exact.sampler, exact.batch_size
        self.plain = DataLoader(exact.dataset, exact.batch_size, shuffle=True, collate_fn=collate,
                                num_workers=exact.num_workers, persistent_workers=exact.num_workers > 0)  # fmt: skip
        self.drop_last = False

    def __len__(self):
        return len(self.exact)

    def __iter__(self):
        yield from (self.exact if self.turns.on else self.plain)


def pairs(model, data, count, batches):
    """Returns (with, without) seconds of adjacent epochs; the first four are a warm-up."""
    with tempfile.TemporaryDirectory(dir=".") as folder, contextlib.redirect_stdout(io.StringIO()):
        turns = Turns([FreezeAudit(), ExactResume(), GracefulShutdown(Path(folder) / "last.ckpt")])
        exact = data.train_dataloader
        data.train_dataloader = lambda: CombinedLoader(
            {name: Batches(turns, loader) for name, loader in exact().iterables.items()}, "min_size"
        )
        saved = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
        trainer = Trainer(
            max_epochs=2 * count + 4, limit_train_batches=batches, limit_val_batches=batches, logger=False,
            callbacks=[turns, saved], plugins=[Files(turns)], enable_progress_bar=False, enable_model_summary=False,
            num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(model, data)
    seconds = [b - a for a, b in zip(turns.starts, turns.starts[1:], strict=False)][4:]
    return list(zip(seconds[1::2], seconds[0::2], strict=True))


def cases(folder):
    """Returns model, data and batches per epoch, by name."""
    for strategy in (FeatureExtraction, FullFineTuning):
        yield f"{strategy.__name__}, Digits", Classification(ConvNet(), 10, finetuning=strategy()), Digits(), None
        if folder:
            squeezenet = TorchvisionBackbone(
                "squeezenet1_0", folder / "weights/squeezenet1_0-imagenet-fp16.safetensors"
            )
            data = ImageFolders(folder / "clothing", image_size=160, augment="none")
            yield f"{strategy.__name__}, clothing", Classification(squeezenet, 10, finetuning=strategy()), data, 20


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--only", default="", help="a part of the cases' names")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    seed_everything(0, verbose=False)
    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{machine}; medians over {args.pairs} pairs of epochs")
    print("| case | seconds with | without | ratio | its quartiles |\n|---|---|---|---|---|")
    results = {}
    for name, model, data, batches in cases(args.data):
        if args.only not in name:
            continue
        measured = pairs(model, data, args.pairs, batches)
        low, ratio, high = statistics.quantiles([with_ / without for with_, without in measured], n=4)
        medians = [statistics.median(each) for each in zip(*measured, strict=True)]
        results[name] = {"with": medians[0], "without": medians[1], "ratio": ratio, "quartiles": [low, high]}
        print(f"| {name} | {medians[0]:.3f} | {medians[1]:.3f} | {ratio:.3f} | {low:.3f} to {high:.3f} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
