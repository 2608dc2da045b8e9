"""Measures which backbones benefit from bfloat16 on this CPU: training and evaluation steps, alternating precisions.

    python benchmarks/precision.py

The reason why `ImageBackbone.bf16_devices` excludes grouped convolutions on CPUs.
"""

import statistics
import time

import torch
from common import machine
from torch.nn import functional as F

from tl_modules import ConvNet, TorchvisionBackbone

NAMES = ("resnet18", "squeezenet1_0", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x1_0", "efficientnet_b0")


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main():
    backbones = {"ConvNet": (ConvNet(), 28)} | {name: (TorchvisionBackbone(name), 160) for name in NAMES}
    print(f"{machine()}, batch 32; seconds in 32 bits / seconds in bfloat16, median of 5\n")
    print("| backbone | training | evaluation | grouped |\n|---|---|---|---|")
    for name, (backbone, side) in backbones.items():
        head = torch.nn.Linear(backbone.out_features, 10)
        optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], fused=True)
        x, y = torch.randint(0, 256, (32, 3, side, side), dtype=torch.uint8), torch.arange(32) % 10

        def train(half, backbone=backbone, head=head, optimizer=optimizer, x=x, y=y):
            backbone.train()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                features = backbone(x)
            optimizer.zero_grad()
            F.cross_entropy(head(features.float()), y).backward()
            optimizer.step()

        def evaluate(half, backbone=backbone, x=x):
            backbone.eval()
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
                backbone(x)

        ratios = []
        for work in (train, evaluate):
            pairs = [(timed(lambda w=work: w(False)), timed(lambda w=work: w(True))) for _ in range(7)][2:]
            ratios.append(statistics.median(a / b for a, b in pairs))
        print(
            f"| {name} | {ratios[0]:.2f} | {ratios[1]:.2f} | {'no' if 'cpu' in backbone.bf16_devices else 'yes'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
