# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tune a pretrained model, from Python
#
# What `make demo` does through the command line, here with objects: pretrain a small network on scanned digits (the
# source), then teach it digits on photographs (the target) from ten labelled images a class, in five ways.

# %%
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import Digits
from tl_modules import Classification, ConvNet, FeatureExtraction, FullFineTuning, GradualUnfreezing, LastStages
from tl_modules.cache import FeatureCache

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
folder = Path(tempfile.mkdtemp())
SEEDS = 3
EPOCHS = 20

# %% [markdown]
# ## The two domains
# A batch names its domains; here there is one, the target. Images are uint8: the backbone normalises them itself.

# %%
source, target = Digits(source=True, target=False), Digits(shots_per_class=10)
figure, rows = plt.subplots(2, 8, figsize=(9, 2.6), layout="constrained")
for row, data in zip(rows, (source, target), strict=True):
    ((name, (images, labels, _)),) = next(iter(data.train_dataloader()))[0].items()
    for axes, image, label in zip(row, images, labels, strict=False):
        axes.imshow(image.permute(1, 2, 0).squeeze(), cmap="gray")
        axes.set_title(f"{name}: {label}", fontsize=8)
        axes.axis("off")


# %% [markdown]
# ## One function for all five
# A module composes a backbone, a head, a fine-tuning strategy and, if you like, methods (`methods=[L2SP()]`).
# The best epoch is chosen on the target's validation split (with its labels), then tested once.


# %%
def fit(module, data, epochs=EPOCHS):
    best = ModelCheckpoint(tempfile.mkdtemp(dir=folder), monitor="val/accuracy", mode="max")
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[best],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    (metrics,) = trainer.test(module, data, ckpt_path=best.best_model_path, verbose=False)
    return best.best_model_path, metrics["test/accuracy"]


def network(weights=None, finetuning=None):
    names = [str(digit) for digit in range(10)]
    return Classification(
        ConvNet(16, weights=weights), {"y": {"classes": names}}, finetuning=finetuning or FullFineTuning()
    )


WAYS = {
    "from scratch": (False, FullFineTuning),
    "frozen": (True, FeatureExtraction),
    "last stages": (True, lambda: LastStages(1)),
    "gradual": (True, lambda: GradualUnfreezing(every=4)),
    "full": (True, FullFineTuning),
}
found = {way: [] for way in WAYS}
for seed in range(SEEDS):
    seed_everything(seed, verbose=False)
    pretrained, accuracy = fit(network(), Digits(source=True, target=False, seed=seed))
    print(f"seed {seed}: the source model reaches {accuracy:.3f} on the source's test split")
    for way, (transfer, strategy) in WAYS.items():
        seed_everything(seed, verbose=False)
        module = network(pretrained if transfer else None, strategy())
        found[way].append(fit(module, Digits(shots_per_class=10, seed=seed))[1])

# %% [markdown]
# ## What transfer is worth

# %%
print(f"{'test accuracy':14s}  mean   std")
for way, values in found.items():
    print(f"{way:14s} {statistics.mean(values):.3f} {statistics.stdev(values):.3f}")

figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
means, spreads = ([f(values) for values in found.values()] for f in (statistics.mean, statistics.stdev))
axes.barh(list(found), means, xerr=spreads, color=["#999999"] + ["#3b7dd8"] * 4)
axes.invert_yaxis()
axes.set(xlim=(0, 1), xlabel="test accuracy")

# %%
scratch = found.pop("from scratch")
best = max(found, key=lambda way: statistics.mean(found[way]))
margin = statistics.mean(found[best]) - statistics.mean(scratch)
assert margin > statistics.stdev(scratch) + statistics.stdev(found[best])
print(f"{best} beats training from scratch by {margin:.3f}")

# %% [markdown]
# ## What is frozen has not moved

# %%
frozen = network(pretrained, FeatureExtraction())
before = {name: tensor.clone() for name, tensor in frozen.backbone.state_dict().items()}
fit(frozen, Digits(shots_per_class=10), epochs=2)
assert all(torch.equal(before[name], tensor) for name, tensor in frozen.backbone.state_dict().items())

# %% [markdown]
# ## ... so it runs only once
# While stages stay frozen, `tl fit` continues from their cached output. From Python, pass the callback that does so.


# %%
def seconds(*callbacks):
    start = time.perf_counter()
    trainer = Trainer(
        max_epochs=EPOCHS,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    seed_everything(0, verbose=False)
    trainer.fit(network(pretrained, FeatureExtraction()), Digits())
    return time.perf_counter() - start, float(trainer.callback_metrics["val/loss"])


(plain, loss), (cached, same) = seconds(), seconds(FeatureCache(folder=str(folder / "features")))
assert abs(loss - same) < 1e-5
print(f"{EPOCHS} epochs on a frozen backbone: {plain:.1f} s; from its cached features: {cached:.1f} s")
