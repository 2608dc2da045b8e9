"""Draws the pictures in images/ from small runs on embedded digits: python docs/pictures.py (a few minutes)."""

import os
import shutil
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tl_modules.cli.main import main

IMAGES = Path(__file__).parent / "images"
COMMANDS = """
show-batch --data Digits --data.source true --data.augment light --out batch.png
lr-find --data Digits --model Classification --model.backbone ConvNet --out look
fit --data Digits --model Classification --model.backbone ConvNet --trainer.max_epochs 15 --name photos
fit --data Digits --data.source true --model.backbone LeNet --model.methods+=MCC --trainer.max_epochs 15 --name mcc
compare sizes.yaml --folder sizes
"""
SIZES = """
options: --data Digits --model Classification --model.backbone ConvNet --trainer.max_epochs 4
seeds: [0, 1]
ways:
  width 4: --model.backbone.width 4
  width 8: --model.backbone.width 8
  width 16: --model.backbone.width 16
  width 16 in int8: {compress: "--run {width 16} --quantize int8"}
benchmark: --batch_sizes [1]
"""
FILES = {"batch": "batch.png", "lr_find": "look/lr_find.png", "pareto": "sizes/pareto.png"}
TENSORBOARD = {  # the picture's name: a run, and a tag in its event file
    "worst": ("photos", "val/worst: true, predicted, loss"),
    "confusion": ("photos", "val/confusion"),
    "domains": ("mcc", "domains/features"),
}


def draw():
    """Runs the commands in the working directory, and copies what they draw."""
    Path("sizes.yaml").write_text(SIZES)
    for line in COMMANDS.strip().splitlines():
        main(line.split())
    IMAGES.mkdir(exist_ok=True)
    for name, file in FILES.items():
        shutil.copy(file, IMAGES / f"{name}.png")
    for name, (run, tag) in TENSORBOARD.items():
        events = EventAccumulator(f"runs/{run}/version_0").Reload()
        (IMAGES / f"{name}.png").write_bytes(events.Images(tag)[-1].encoded_image_string)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["TL_CACHE_DIR"] = f"{folder}/cache"
        draw()
