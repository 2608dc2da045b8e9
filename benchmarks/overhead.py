"""Measures what `tl fit` adds to an equally optimised hand-written loop: time and memory of a step, start-up.

    python benchmarks/overhead.py --out overhead.json

The hand-written loops use channels_last, bfloat16 if `tl` does, a fused AdamW, data in memory and no `.item()`.
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import STEPS, TL, report, timed
from torch import nn
from torch.nn import functional as F
from torchvision import models

from tl_modules import Classification, LastStages, TorchvisionBackbone
from tl_modules.cli.main import main as tl
from tl_modules.evaluation import peak_memory


def ours(line):
    """Returns the median seconds of a step of `tl fit`, without the first epoch (caches, figures)."""
    STEPS.clear()
    with contextlib.redirect_stdout(io.StringIO()):
        tl(f"{line} --trainer.callbacks+=common.Clock".split())
    return statistics.median(STEPS[len(STEPS) // 2 :])


def network_step(images, labels, batch, steps):
    """Returns the median seconds of a step of a hand-written loop on resnet18."""
    model = models.resnet18()
    model.fc = nn.Linear(512, 10)
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(-1, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(-1, 1, 1)
    bf16, times = torch.cpu._is_avx512_bf16_supported(), []
    for _ in range(steps):
        start = time.perf_counter()
        rows = torch.randint(len(images), (batch,))
        x = ((images[rows] / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(x)
        loss = F.cross_entropy(output.float(), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[len(times) // 2 :])


def head_step(features, labels, batch, steps):
    """Returns the median seconds of a step of a hand-written loop on features."""
    head = nn.Linear(features.shape[1], 10)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, fused=True)
    total, times = torch.zeros(()), []
    order = torch.randperm(len(features))
    for step in range(steps):
        start = time.perf_counter()
        place = step * batch % (len(features) - batch)
        rows = order[place : place + batch]
        loss = F.cross_entropy(head(features[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def memory():
    """Returns the peak bytes of a partly frozen step, and of its halves: no-grad forward plus the trainable part."""
    torch.manual_seed(0)
    module = Classification(TorchvisionBackbone("resnet18"), 10, finetuning=LastStages(1)).train()
    x, y = torch.randint(0, 256, (16, 3, 224, 224), dtype=torch.uint8), torch.arange(16) % 10
    batch = {"target": (x, y)}
    from tl_modules.cache.cut import Cut

    cut = Cut(module.backbone, 4, x, pooled=True)

    def step():
        module.zero_grad(set_to_none=True)
        module.training_step(batch, 0).backward()

    def frozen():
        with torch.no_grad():
            cut.record(x)

    with torch.no_grad():
        tree = cut.record(x)

    def trainable():
        module.zero_grad(set_to_none=True)
        F.cross_entropy(module.head(cut.replay(tree)), y).backward()

    step()
    whole = peak_memory(step, x.device)
    module.zero_grad(set_to_none=True)
    parts = peak_memory(frozen, x.device), peak_memory(trainable, x.device)
    return whole, sum(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    rows = []

    def add(case, mine, theirs, wanted):
        rows.append({"case": case, "ours": mine, "theirs": theirs, "wanted": wanted})
        print(f"{case}: {mine:.4g} {theirs:.4g} {theirs / mine:.3f}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        os.environ["TL_CACHE_DIR"] = str(Path(scratch) / "cache")
        generator = np.random.default_rng(0)
        for name, side, count in (("large", 224, 128), ("small", 32, 3200)):
            images = generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
            numbers = generator.integers(10, size=count)
            numbers[:10] = range(10)
            few = {"val_images": images[:32], "val_labels": numbers[:32]}
            np.savez(f"{name}.npz", train_images=images, train_labels=numbers, **few)
        large = np.load("large.npz")
        images = torch.from_numpy(large["train_images"]).permute(0, 3, 1, 2).contiguous()
        labels = torch.from_numpy(large["train_labels"])
        common = "fit --data ImageArrays --model Classification --model.optimizer torch.optim.AdamW "
        common += "--model.optimizer.lr 1e-3 --model.head torch.nn.Linear --model.lr_scheduler null "
        for _ in range(args.pairs):
            theirs = network_step(images, labels, 32, 12)
            mine = ours(
                common + "--data.target large.npz --model.backbone TorchvisionBackbone --model.backbone.name resnet18 "
                "--trainer.max_epochs 4 --model.finetuning FullFineTuning"
            )
            add("step of resnet18, 224 px, batch 32, s", mine, theirs, "1 / 1.03")
        features, numbers = torch.randn(3200, 128), torch.randint(10, (3200,))
        for batch in (32, 512):
            for _ in range(args.pairs):
                theirs = head_step(features, numbers, batch, 1000)
                mine = ours(
                    common + f"--data.target small.npz --model.backbone ConvNet --data.batch_size {batch} "
                    "--model.finetuning FeatureExtraction "
                    f"--trainer.max_epochs {6 if batch == 32 else 30}"
                )
                wanted = "1 / 2" if batch == 32 else ""
                add(f"step on cached features, batch {batch}, s", mine, theirs, wanted)
                print(f"   {batch / mine:,.0f} samples/s")
        whole, both = memory()
        add("memory of a LastStages(1) step, resnet18, batch 16, bytes", whole, both, "1 / 1.1")
        (Path(scratch) / "bare.py").write_text(BARE)
        for _ in range(args.pairs):
            theirs, _ = timed([sys.executable, "-c", "import lightning.pytorch.cli"], scratch)
            add("tl --help beside importing lightning's CLI, s", timed([*TL, "--help"], scratch)[0], theirs, "1 / 1.2")
            line = "fit --trainer.callbacks+=common.Leave"
            path = {"PYTHONPATH": str(Path(__file__).parent)}
            theirs, _ = timed([sys.executable, "bare.py"], scratch, path)
            add(
                "tl fit to its first step beside a bare Trainer, s",
                timed([*TL, *line.split()], scratch, path)[0],
                theirs,
                "2 s more",
            )
    report(rows, args.out)


BARE = """
import torch
from common import Leave
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        pool = nn.AdaptiveAvgPool2d(1)
        self.net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(32, 10))
    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

data = TensorDataset(torch.rand(448, 3, 28, 28), torch.randint(10, (448,)))
Trainer(max_steps=1, callbacks=[Leave()]).fit(Net(), DataLoader(data, 32, shuffle=True))
"""


if __name__ == "__main__":
    main()
