"""Small runs that every pretraining can be put into.

As a program it is one rank of two: `RANK=0 WORLD_SIZE=2 ... python unlabelled.py` runs every pretraining.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import seed_everything
from small_runs import exported, fit
from torch.utils.data import TensorDataset

from datamodules import TransferDataModule
from tl_modules import CLIP, GAN, SCARF, Autoencoder, ConvNet, Pretraining, SeveralBackbones, TabularMLP

PRETRAININGS = exported(Pretraining)
SMALL = {
    Autoencoder: {"image_size": 12, "width": 4},
    GAN: {"image_size": 12, "width": 4, "latent": 8},
}
CASES = [(each, "image") for each in PRETRAININGS if each not in (SCARF, CLIP)]
CASES += [(each, "vector") for each in (SCARF, Autoencoder)] + [(CLIP, "pair")]


class Unlabelled(TransferDataModule):
    """24 images of three shades, as many rows of five numbers, or pairs of them; 9 to evaluate."""

    def __init__(self, kind="image", classes=True, labels=None, domains=("target",), **kwargs):
        super().__init__(batch_size=8, **kwargs)
        self.kind, self.labels, self.names = kind, labels, domains
        self.class_names = ["a", "b", "c"] if classes else None

    def domains(self, split):
        found = {}
        for number, name in enumerate(self.names):
            generator = np.random.default_rng([number, len(split)])
            y = generator.permutation(np.arange(24 if split == "train" else 9) % 3)
            shape = (len(y), 5) if self.kind == "vector" else (len(y), 1, 12, 12)
            x = generator.normal(size=shape) * 0.3 + y.reshape(-1, *(1,) * (len(shape) - 1)) + 0.5 * number
            x = (x * 40 + 40).clip(0, 255).astype(np.uint8) if self.kind != "vector" else x.astype(np.float32)
            rows = generator.normal(size=(len(y), 5)) + y[:, None]
            y = y if self.labels is None else self.labels(y)
            y = torch.from_numpy(y if self.class_names else y.astype(np.float32))
            found[name] = TensorDataset(torch.from_numpy(x), y)
            if self.kind == "pair":
                rows = torch.from_numpy(rows.astype(np.float32))
                pairs = [{"image": image, "row": row} for image, row in zip(torch.from_numpy(x), rows, strict=True)]
                pairs[1]["image"] = pairs[2]["row"] = None
                found[name] = list(zip(pairs, y, strict=True))
        return found


def backbone_of(kind, weights=None):
    """A small backbone."""
    if kind == "pair":
        return SeveralBackbones({"image": ConvNet(4), "row": TabularMLP(5, [8, 8])}, weights=weights)
    return ConvNet(4, weights) if kind == "image" else TabularMLP(5, [8, 8], weights=weights)


def build(pretraining, kind="image", schema=None, **kwargs):
    """A pretraining of a small backbone; the same in every call."""
    seed_everything(0, verbose=False)
    options = SMALL.get(pretraining, {}) if kind == "image" else {}
    return pretraining(
        backbone_of(kind), schema={"y": {"classes": ["a", "b", "c"]}} if schema is None else schema, **options, **kwargs
    )


def one_rank():
    """The sum of the parameters after each run on two processes, whole and resumed; or what went wrong."""
    found = {}
    for pretraining, kind in CASES:
        for stage in ("whole", "resumed"):
            folder = Path(f"{pretraining.__name__}-{kind}")
            module = build(pretraining, kind)
            options = {"devices": 2, "strategy": "ddp_find_unused_parameters_true", "use_distributed_sampler": True}
            keep = {"folder": folder} if stage == "whole" else {"ckpt_path": folder / "step=3.ckpt"}
            try:
                fit(module, Unlabelled(kind), **keep, **options)
                found[f"{folder} {stage}"] = sum(float(p.detach().double().sum()) for p in module.parameters())
            except Exception:
                found[f"{folder} {stage}"] = traceback.format_exc()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(f"rank-{os.environ['RANK']}.json").write_text(json.dumps(one_rank()))
    sys.exit(0)
