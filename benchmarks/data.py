"""Measures images per second: our loader beside torchvision's ImageFolder and a DataLoader, alternating epochs.

python benchmarks/data.py --data $TL_DATA_DIR --out data.json
"""

import argparse
import os
import time
from pathlib import Path

import torch
from common import report
from torchvision import datasets, transforms

from datamodules import ImageFolders


def rate(loader):
    """Returns images per second over an epoch, including the workers' start."""
    start, count = time.perf_counter(), 0
    for x, *_ in loader:
        count += len(x)
    return count / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("TL_DATA_DIR"))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    root, rows = args.data.resolve() / "clothing", []
    for size in (64, 160, 224):
        for _ in range(args.pairs):
            steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
            steps.append(transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
            folder = datasets.ImageFolder(str(root / "train"), transforms.Compose(steps))
            theirs = rate(torch.utils.data.DataLoader(folder, 32, shuffle=True, num_workers=2))
            data = ImageFolders(root, image_size=size, augment="none")
            mine = rate(batch["target"] for batch, _, _ in iter(data.train_dataloader()))
            data.teardown("fit")
            # seconds per image, so that a ratio above 1 is faster, as everywhere
            rows.append({"case": f"{size} px, s an image", "ours": 1 / mine, "theirs": 1 / theirs, "wanted": "1"})
            print(f"{size} px: ours {mine:.0f}, theirs {theirs:.0f} images/s", flush=True)
    report(rows, args.out)


if __name__ == "__main__":
    main()
