"""Small runs that every method can be put into: two sources, an unlabelled target, images or vectors.

As a program it is one rank of two: `RANK=0 WORLD_SIZE=2 ... python cases.py` runs every method on every kind of data.
"""

import functools
import inspect
import itertools
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch
import yaml
from lightning.pytorch import seed_everything
from small_runs import exported, fit, same
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from datamodules import TransferDataModule
from tl_modules import (
    AttentionTransfer,
    Backbone,
    BatchAugmentation,
    Classification,
    ConvNet,
    LinearHead,
    Method,
    TabularMLP,
)
from tl_modules.backbones.weights import Pretrained
from tl_modules.batch.samples import Batch
from tl_modules.checkpoints import contents

KINDS = ("image", "vector")


METHODS = exported(Method)
OF_IMAGES = (AttentionTransfer, BatchAugmentation)
PRODUCT = [(m, kind) for m, kind in itertools.product(METHODS, KINDS) if m not in OF_IMAGES or kind == "image"]


def kind_of(method):
    """Vectors, which are fast, but for a method that needs images."""
    return "image" if method in OF_IMAGES else "vector"


class Vectors(Backbone):
    """Two layers for vectors of five numbers."""

    out_features = 8

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(i, 8), nn.BatchNorm1d(8), nn.ReLU()) for i in (5, 8)))

    def forward(self, x):
        return self.layers(x)

    def stages(self):
        return list(self.layers)


class Several(TransferDataModule):
    """Three classes (or values), which each domain shows in its own way; 24 samples to train, 9 to evaluate."""

    def __init__(self, kind, domains=("source/a", "source/b", "target"), values=False, labels=None, **kwargs):
        super().__init__(batch_size=8, **kwargs)
        self.kind, self.names, self.labels = kind, domains, labels
        self.class_names = None if values else ["a", "b", "c"]

    def domains(self, split):
        found = {}
        for number, name in enumerate(self.names):
            generator = np.random.default_rng([number, len(split)])
            y = generator.permutation(np.arange(24 if split == "train" else 9) % 3)
            shape = (len(y), 3, 12, 12) if self.kind == "image" else (len(y), 5)
            x = generator.normal(size=shape) * 0.3 + y.reshape(-1, *(1,) * (len(shape) - 1)) + 0.5 * number
            x = (x * 40).clip(0, 255).astype(np.uint8) if self.kind == "image" else x.astype(np.float32)
            if name == "target" and self.labels is not None:
                y = self.labels(y)
            y = torch.tensor(y) if self.class_names else torch.tensor(y, dtype=torch.float32)
            found[name] = TensorDataset(torch.tensor(x), y)
        return found


def saved_run(module, folder, backbone, **init):
    """Leaves a run of a module as `tl fit` would; `backbone` and `init` are its arguments."""
    (folder / "checkpoints").mkdir(parents=True)
    arguments = {"backbone": backbone, "schema": dict(module.schema), **init}
    task = f"tl_modules.{type(module).__name__}"
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"class_path": task, "init_args": arguments}}))
    checkpoint = {"state_dict": module.state_dict(), "pytorch-lightning_version": "2.6.6"}
    contents.save(module, checkpoint)
    torch.save(checkpoint, folder / "checkpoints" / "best.ckpt")
    return folder


def schema_of(task, names=("a", "b", "c")):
    return {"y": {"classes": list(names)} if task.is_classification else {"values": 1}}


@functools.cache
def teacher(kind, task=Classification, seed=0, names=("a", "b", "c")):
    """The run of a network that is wider than the student, whose classes may be in another order."""
    torch.manual_seed(seed)
    image = kind == "image"
    backbone = ConvNet(6) if image else TabularMLP(5, [12, 12])
    given = {"width": 6} if image else {"in_features": 5, "widths": [12, 12], "scale": "each"}
    spec = {"class_path": f"tl_modules.{type(backbone).__name__}", "init_args": given}
    module = task(backbone, schema_of(task, names))
    torch.nn.init.normal_(module.head[1].weight)  # LinearHead's are near zero
    return saved_run(module, Path(tempfile.mkdtemp()) / "run", spec)


def arguments(method, kind="vector", task=Classification):
    """What a method cannot do without."""
    required = {
        "source_classes": lambda: 3,
        "teacher": lambda: teacher(kind, task),
        "transforms": lambda: [v2.ColorJitter(0.5)],
    }
    return {name: required[name]() for name in inspect.signature(method.__init__).parameters if name in required}


def build(methods, kind, task=Classification, **kwargs):
    """A module with the methods, on a network that counts as pretrained on the same classes."""
    seed_everything(0, verbose=False)
    backbone = ConvNet(4) if kind == "image" else Vectors()
    outputs, names = (3, ["a", "b", "c"]) if task is Classification else (1, None)
    head = LinearHead(backbone.out_features, outputs)
    known = {"task": task.__name__, "class_names": names, "num_outputs": outputs}
    backbone.pretrained = Pretrained("made up", {}, task=known, head=head.state_dict())
    methods = [method(**arguments(method, kind, task)) for method in methods]
    return task(backbone, {"y": {"classes": names} if names else {"values": outputs}}, methods=methods, **kwargs)


def one_rank():
    """Runs every method, and once more from a checkpoint; gives what went wrong, or the sum of the parameters."""
    found = {}
    first = int(os.environ["MASTER_PORT"])

    def two(number, module, kind, **options):
        os.environ["MASTER_PORT"] = str(first + number)  # the same on both ranks, whatever one of them has raised
        options |= {"devices": 2, "strategy": "ddp_find_unused_parameters_true", "limit_val_batches": 0}
        try:
            fit(module, Several(kind), **options)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        return module

    for number, (method, kind) in enumerate(PRODUCT):
        name = f"{method.__name__} {kind}"
        try:
            whole = two(2 * number, build([method], kind), kind, folder=Path(name))
            resumed = two(2 * number + 1, build([method], kind), kind, ckpt_path=Path(name) / "step=3.ckpt")
            differ = same(whole.state_dict(), resumed.state_dict())
            values = sum(float(p.detach().double().abs().sum()) for p in whole.parameters())
            found[name] = f"a resumed run differs in {differ[:3]}" if differ else values
        except Exception:
            found[name] = traceback.format_exc()
    return found


def student(method, kind="vector", **options):
    """A small network with one method that has a teacher."""
    torch.manual_seed(0)
    return Classification(
        ConvNet(4) if kind == "image" else Vectors(), schema_of(Classification), methods=[method], **options
    )


def made(method, **kwargs):
    """A module with one method, and views of a source batch of two domains and of a target batch."""
    torch.manual_seed(0)
    module = Classification(Vectors(), {"y": {"classes": ["a", "b", "c"]}}, methods=[method], **kwargs)
    module.adapts = True  # as in training with a source
    module.train()
    x, y = torch.randn(12, 5), torch.arange(8) % 3
    batch = {"source/a": (x[:4], y[:4]), "source/b": (x[4:8], y[4:]), "target": (x[8:], None, torch.arange(4))}
    views = module.forward_domains(batch)
    method.transform_batch(module, {name: Batch(*part) for name, part in batch.items()})
    return module, views["source"], views["target"]


def gradients(module, term):
    """Which of the module's parts get a gradient from a term that is not 0."""
    module.zero_grad()
    term.backward()
    parts = {"backbone": module.backbone, "head": module.head, "method": module.methods}
    found = {}
    for name, part in parts.items():
        each = [p.grad is not None and bool(p.grad.any()) for p in part.parameters() if p.requires_grad]
        found[name] = all(each) if each and any(each) else False
        assert len(set(each)) < 2 or name == "backbone", f"only some of {name} get a gradient"
    return {name for name, gets in found.items() if gets}


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(f"rank-{os.environ['RANK']}.json").write_text(json.dumps(one_rank()))
    sys.exit(0)
