"""Measures how the cost of a frozen SqueezeNet grows with images, epochs, classes, image size and processes.

    python benchmarks/scaling.py --out scaling.json

Seconds of `tl fit` on synthetic JPEG files, relative to the base case: in total, and without the start-up (a run of one
epoch on few images).
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import TL, machine, timed
from PIL import Image

CASES = {
    "base": {},
    "images x 2": {"images": 4800},
    "epochs x 2, on the cache": {"epochs": 20},
    "classes x 2": {"classes": 20},
    "image size x 2 (4 x the pixels)": {"size": 256},
    "2 processes": {"processes": 2},
}
WANTED = {"images x 2": 2.1, "epochs x 2, on the cache": 1.1}


def tree(root, images, classes):
    """Makes a folder of noisy JPEG files, 256 px."""
    generator = np.random.default_rng(0)
    for number in range(images + 2 * classes):
        label, split = number % classes, "val" if number < 2 * classes else "train"
        place = root / split / f"class{label:02}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((256, 256)).save(place / f"{number}.jpg", quality=90)
    return root


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)

        def seconds(name, images=2400, classes=10, size=128, epochs=10, processes=1):
            data = scratch / f"{images}-{classes}"
            if not data.exists():
                tree(data, images, classes)
            line = [*TL, "fit", "--data", "ImageFolders", f"--data.target={data}", f"--data.image_size={size}"]
            line += ["--model", "Classification", "--model.backbone", "TorchvisionBackbone"]
            line += ["--model.backbone.name", "squeezenet1_0", "--model.finetuning", "FeatureExtraction"]
            line += [f"--trainer.max_epochs={epochs}", f"--trainer.default_root_dir={scratch / name}"]
            if processes > 1:
                line += ["--trainer.accelerator=cpu", f"--trainer.devices={processes}", "--trainer.strategy=ddp"]
                line += ["--data.num_workers=1"]
            took, _ = timed(line, scratch, {"TL_CACHE_DIR": str(scratch / f"cache-{name}-{len(rows)}")})
            return took

        for pair in range(args.pairs):
            start = seconds("start", images=20, epochs=1)
            rows.append({"start": start} | {name: seconds(name, **case) for name, case in CASES.items()})
            print(pair, {k: round(v, 1) for k, v in rows[-1].items()}, flush=True)
    print(f"\n{machine()}\n\n| case | s | beside base | less start-up | wanted |\n|---|---|---|---|---|")
    for name in CASES:
        whole, net = (
            statistics.median((row[name] - less * row["start"]) / (row["base"] - less * row["start"]) for row in rows)
            for less in (0, 1)
        )
        took = statistics.median(row[name] for row in rows)
        print(f"| {name} | {took:.1f} | {whole:.2f} | {net:.2f} | {WANTED.get(name, '')} |")
    if args.out:
        args.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
