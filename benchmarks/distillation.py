"""Measures a teacher that runs once beside one that runs in every epoch: seconds per epoch, and equal students.

    python benchmarks/distillation.py                           embedded digits, a ResNet-18 teaches a ConvNet
    python benchmarks/distillation.py --data $TL_DATA_DIR       clothes at 64 px too, a SqueezeNet teaches it

Both sides of a pair train the same student from the same seed. The first epoch of the cached side, in which the teacher
runs, is counted separately, like the feature cache's measurement of what pays. The teachers' weights are random: their
outputs cost the same.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import TL, report, timed
from lightning.pytorch import Callback, Trainer, seed_everything

from datamodules import Digits, ImageFolders
from tl_modules import Classification, ConvNet, Distill
from tl_modules.cache import FeatureCache


class Epochs(Callback):
    """Measures the seconds of each training epoch; of the first one, from when the cache runs the teacher."""

    def on_train_start(self, trainer, module):
        self.seconds, self.start = [], time.perf_counter()

    def on_train_epoch_end(self, trainer, module):
        now = time.perf_counter()
        self.seconds.append(now - self.start)
        self.start = now


def train(data, teacher, cached, epochs, folder):
    """Returns the student's tensors, and the seconds of its epochs."""
    seed_everything(0, verbose=False)
    module = Classification(ConvNet(8), data.schema, methods=[Distill(teacher)])
    clock = Epochs()
    trainer = Trainer(
        max_epochs=epochs, callbacks=[clock, FeatureCache(cached, folder=folder)], logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data)
    return module.state_dict(), clock.seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    digits = {"--data": "Digits", "--model.backbone.name": "resnet18"}
    cases = {"digits, ResNet-18 -> ConvNet": (lambda: Digits(augment="none"), digits)}
    if options.data:
        clothing = (options.data / "clothing").resolve()
        words = {"--data": "ImageFolders", "--data.target": clothing, "--data.image_size": 64, "--data.num_workers": 0}
        words["--model.backbone.name"] = "squeezenet1_0"

        def clothes():
            return ImageFolders(clothing, image_size=64, num_workers=0, augment="none")

        cases["clothes, SqueezeNet -> ConvNet"] = clothes, words
    rows = []
    for case, (data, words) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            backbone = ["--model", "Classification", "--model.backbone", "TorchvisionBackbone"]
            short = ["--trainer.max_epochs", 1, "--trainer.limit_train_batches", 1, "--trainer.limit_val_batches", 1]
            given = [word for pair in words.items() for word in pair]
            timed([*TL, "fit", "--name", "teacher", "--trainer.logger", "false", *backbone, *given, *short], folder)
            run = Path(folder) / "runs" / "teacher"
            for pair in range(options.pairs):
                one, cached = train(data(), run, True, options.epochs, str(Path(folder) / f"cache-{pair}"))
                other, live = train(data(), run, False, options.epochs, str(Path(folder) / "none"))
                equal = all(torch.equal(one[key], other[key]) for key in one)
                ours, theirs = statistics.median(cached[1:]), statistics.median(live[1:])
                print(f"{case}: an epoch {ours:.2f} s cached (the first {cached[0]:.2f} s), {theirs:.2f} s without; "
                      f"students {'equal to the bit' if equal else 'DIFFER'}", flush=True)  # fmt: skip
                rows.append({"case": case, "ours": ours, "theirs": theirs, "wanted": "at least 3, equal students"})
    report(rows, options.out)


if __name__ == "__main__":
    main()
