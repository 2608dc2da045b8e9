"""Compares `tl fit` with the tutorial's loop: wall time from the command to its end, with start-up, in pairs.

    python benchmarks/train.py --data $TL_DATA_DIR --cases features last --pairs 3 --out train.json

Both sides have the same images, weights, batch size, epochs and optimizer. The first `tl fit` of a pair finds an empty
cache, the second one the cache of the first. `--tutorial_epochs 2` runs this many of the tutorial's epochs, which are
all alike, and adds the others at their mean (not for `gradual`, whose epochs differ).
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from common import TL, report, timed

HERE = Path(__file__).parent
FINETUNING = {
    "features": ["FeatureExtraction"],
    "last": ["LastStages", "--model.finetuning.k", "1"],
    "gradual": ["GradualUnfreezing", "--model.finetuning.every", "2"],
    "full": ["FullFineTuning"],
}
# the required speed-up
WANTED = {
    "features": "12",
    "features again": "35",
    "last": "3",
    "gradual": "1.5",
    "full": "2 (1.25 without avx512_bf16)",
}


def subset(source, images, folder):
    """Makes links to the first `images` training images, alternating between classes, and all validation images."""
    if not images:
        return source
    classes = [sorted(d.iterdir()) for d in sorted((source / "train").iterdir())]
    chosen = [c[i] for i in range(max(map(len, classes))) for c in classes if i < len(c)][:images]
    for file in [*chosen, *(f for d in (source / "validation").iterdir() for f in d.iterdir())]:
        place = folder / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file.resolve())
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("TL_DATA_DIR"))
    parser.add_argument("--cases", nargs="+", choices=list(FINETUNING), default=list(FINETUNING))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--tutorial_epochs", type=int)
    parser.add_argument("--images", type=int, default=0, help="number of training images; 0 takes all")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    weights = args.data.resolve() / "weights" / "squeezenet1_0-imagenet-fp16.safetensors"
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        data = subset(args.data.resolve() / "clothing", args.images, Path(scratch) / "images")
        for case in args.cases:
            model, given = ("resnet18", []) if case == "full" else ("squeezenet1_0", [str(weights)])
            for pair in range(args.pairs):
                folder = Path(scratch) / f"{case}{pair}"
                folder.mkdir()
                ran = args.epochs if case == "gradual" else min(args.tutorial_epochs or args.epochs, args.epochs)
                tutorial = [sys.executable, HERE / "tutorial.py", "--data", data, "--model", model, "--way", case]
                tutorial += ["--epochs", str(ran), "--size", str(args.size), "--seed", str(pair)]
                tutorial += ["--weights", *given] if given else []
                seconds, said = timed(tutorial, folder)
                finished = json.loads(said.splitlines()[-1])
                seconds += statistics.mean(finished["seconds"]) * (args.epochs - ran)
                ours = [
                    *TL,
                    *["fit", "--name", "x", "--model", "Classification", "--model.backbone", "TorchvisionBackbone"],
                ]
                ours += ["--model.backbone.name", model, "--data", "ImageFolders", f"--data.target={data}"]
                ours += [f"--data.image_size={args.size}", "--data.augment=none", f"--trainer.max_epochs={args.epochs}"]
                ours += ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "1e-3"]
                ours += ["--model.head", "torch.nn.Linear", "--model.lr_scheduler", "null"]
                ours += ["--model.backbone.weights", *given] if given else []
                ours += ["--seed_everything", str(pair), "--data.seed", str(pair)]
                ours += ["--model.finetuning", *FINETUNING[case]]
                ours += ["--model.finetuning.backbone_lr", "1", "--model.finetuning.batch_norm", "train"]
                cache = {"TL_CACHE_DIR": str(folder / "cache")}
                first, _ = timed(ours, folder, cache)
                second = timed(ours, folder, cache)[0] if case == "features" else None
                reached = json.loads((folder / "runs/x/version_0/metrics.json").read_text())["val/accuracy"]
                accuracy = finished["accuracy"] if ran == args.epochs else None
                for name, took in ((case, first), (f"{case} again", second)):
                    if took is not None:
                        row = {"case": name, "ours": took, "theirs": seconds, "wanted": WANTED[name], "pair": pair}
                        rows.append(row | {"accuracy": reached, "their accuracy": accuracy, "their epochs run": ran})
                        print(json.dumps(rows[-1]), flush=True)
                shutil.rmtree(folder)
    print(
        f"\nseconds; {args.images or 'all'} training images of {args.size} px, {args.epochs} epochs, {args.pairs} pairs"
    )
    report(rows, args.out)


if __name__ == "__main__":
    main()
