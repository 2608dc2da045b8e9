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
# # Adapt to a domain without labels
#
# The source has labels: scanned digits. The target has none: digits on photographs. Methods are terms of the loss that
# bring the two together; what chooses the epoch may not look at the target's labels either, and the report afterwards
# says how far from the oracle that was.

# %%
import logging
import statistics
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Trainer, seed_everything
from torchvision.transforms.v2 import RandomInvert

from datamodules import Digits
from tl_modules import CORAL, DANN, DSBN, MCC, Classification, FixMatch, LeNet, MLPHead
from tl_modules.evaluation import ModelSelection
from tl_modules.evaluation.model_selection import report

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
folder = Path(tempfile.mkdtemp())
SEEDS = 1
EPOCHS = 8

# %% [markdown]
# ## What training sees
# Beside a source the target's labels are hidden: `None` in every training batch.

# %%
data = Digits(source=True)
batch, *_ = next(iter(data.train_dataloader()))
{domain: (tuple(x.shape), None if y is None else tuple(y.shape)) for domain, (x, y, _) in batch.items()}

# %% [markdown]
# ## Some ways to adapt
# An empty list is the model that only knows the source. Methods stack: each adds a term to the loss.

# %%
WAYS = {
    "source only": lambda: [],
    "CORAL": lambda: [CORAL()],
    "DANN": lambda: [DANN(weight=0.3, batch_norm=True)],
    "DSBN + MCC": lambda: [DSBN(), MCC()],
    "DSBN + FixMatch": lambda: [DSBN(), FixMatch()],
}


def adapt(way, seed):
    """Trains one model; gives it, what chose its epochs, and its data."""
    seed_everything(seed, verbose=False)
    data = Digits(source=True, seed=seed, batch_size=32, augment=[RandomInvert(0.5)])
    backbone = LeNet(batch_norm=True, instance_norm=True)
    model = Classification(backbone, data.schema, head=MLPHead, methods=WAYS[way]())
    selection = ModelSelection("source")
    trainer = Trainer(
        max_epochs=EPOCHS,
        callbacks=[selection],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    return model, selection, data


def labels(data):
    """The target's labels, which only the report may see."""
    return {split: torch.as_tensor(data.labels(split)) for split in ("val", "test")}


runs = {(way, seed): adapt(way, seed) for way in WAYS for seed in range(SEEDS)}
reports = {key: report(model, selection.rows, labels(data)) for key, (model, selection, data) in runs.items()}

# %% [markdown]
# ## Chosen without labels, beside the oracle
# `source` takes the epoch with the best accuracy on labelled source validation images, `infomax` and `snd` look at the
# target's predictions without labels; the oracle has seen all labels of the target's validation split.

# %%
CRITERIA = ("source", "infomax", "snd", "last", "oracle")
print(f"{'test accuracy':28s}" + "".join(f"{name:>10s}" for name in CRITERIA))
for way in WAYS:
    means = []
    for name in CRITERIA:
        values = [row["test"] for seed in range(SEEDS) for row in reports[way, seed] if row["chosen by"] == name]
        means.append(statistics.mean(values))
    print(f"{way:28s}" + "".join(f"{mean:10.3f}" for mean in means))

# %% [markdown]
# ## Epoch by epoch
# The test accuracy, which only the report may see, beside a criterion that training itself can look at.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for way in WAYS:
    model, selection, data = runs[way, 0]
    accuracy = [model.primary_metric(row["test"], labels(data)["test"]) for row in selection.rows]
    axes[0].plot(accuracy, label=way)
    axes[1].plot([row["scores"]["infomax"] for row in selection.rows])
axes[0].set(title="target test accuracy", xlabel="epoch")
axes[1].set(title="infomax, which needs no label", xlabel="epoch")
axes[0].legend(fontsize=7)

# %% [markdown]
# ## The same from the command line
#
# ```
# tl fit -c configs/data/digits.yaml -c configs/model/lenet.yaml -c configs/method/dsbn.yaml \
#        -c configs/method/mcc.yaml --data.source true --selection.criterion infomax --name adapted
# tl test --run runs/adapted            # with the report
# tl test --run runs/adapted --trainer.callbacks+=AdaBN      # adapted once more, to the test images
# tl compare configs/recipes/mnist_m_compare.yaml            # ways x seeds, a table and a plot
# ```
