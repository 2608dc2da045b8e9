"""What the tests of the cache share: a short run, a small model, and the curve of its metrics."""

import csv

import torch
from lightning.pytorch import Trainer, seed_everything

import tl_modules
from datamodules import ImageFolders
from tl_modules import Classification, ConvNet
from tl_modules.cache import FeatureCache

# in double precision: LayerNorm behind four features that hardly differ makes any rounding large
RUN = (
    "fit --data Digits --trainer.max_epochs 4 --trainer.precision 64-true --trainer.logger false --model.backbone.width 4 "
    "--data.batch_size 48 --cache.folder cache --model.optimizer torch.optim.SGD --model.optimizer.lr 0.05 "
)
RUNS = "the frozen stages run in every epoch"


def curve(folder):
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def fit(data, module, epochs=2, **options):
    seed_everything(0)
    cache = FeatureCache(**options)
    trainer = Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[cache]
    )
    trainer.fit(module, data)
    return trainer


def small(strategy="FeatureExtraction", **options):
    torch.manual_seed(0)
    return Classification(ConvNet(4), 3, finetuning=getattr(tl_modules, strategy)(), **options)


def folders(tree, **options):
    return ImageFolders(tree, **{"image_size": 32, "num_workers": 0, "batch_size": 8, "augment": "none"} | options)


def reused(said, tree, folder, module=None, **options):
    fit(folders(tree, **options), module or small(), folder=str(folder))
    return [text.split(":")[1].strip() for text in said() if "of an earlier run" in text]
