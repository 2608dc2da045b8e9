"""Small runs with what `tl` adds to a Trainer, and their comparison."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import tl_modules
from tl_modules.cache import FeatureCache
from tl_modules.finetuning.audit import FreezeAudit
from tl_modules.runs import ExactResume


def exported(base):
    """Every public subclass, so that a new one is tested by existing."""
    named = dict.fromkeys(c for c in vars(tl_modules).values() if isinstance(c, type))  # once, whatever its names
    return [c for c in named if issubclass(c, base) and c is not base]


def fit(module, data, folder=None, ckpt_path=None, callbacks=(), epochs=2, cached=True, **options):
    """Trains it with what `tl` adds; with `folder`, a step within the second epoch leaves a checkpoint there.

    `cached` may be a FeatureCache of one's own.
    """
    cache = cached if isinstance(cached, FeatureCache) else FeatureCache(enabled=cached)
    at = 3 if options.get("devices") == 2 else 5  # an epoch has 24 samples of each domain in batches of 8
    keep = [ModelCheckpoint(folder, "{step}", every_n_train_steps=at, save_top_k=-1)] if folder else []
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[*callbacks, cache, FreezeAudit(), ExactResume(), *keep],
        enable_checkpointing=bool(folder),
        accelerator="cpu",
        num_sanity_val_steps=0,
        **(quiet | options),
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def same(one, two):
    """The names of the tensors in which two state dicts differ."""
    return [k for k in one.keys() | two.keys() if k not in one or k not in two or not torch.equal(one[k], two[k])]
