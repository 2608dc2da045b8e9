"""Checks the defaults: every strategy that trains the backbone beside `FeatureExtraction`, and this beside LDA.

Clothing with 10, 30 and 100 images per class, emoji with 30, magnetic tiles; SqueezeNet, MobileNetV1 and NanoDet's
backbone; only the strategy is set. The epoch is chosen on the validation split, accuracy is on the test split.

python benchmarks/defaults.py --data $TL_DATA_DIR --out defaults.jsonl

Runs already in the file are not repeated; the table at the end covers all of them.
"""

import csv
import itertools
import json
import logging
import statistics
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from common import rows_of, training_options
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from safetensors.torch import load_file
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn

import tl_modules
from datamodules import ImageArrays
from tl_modules import Classification, ImageBackbone, TorchvisionBackbone
from tl_modules.cache import FeatureCache

# images of each class; None takes all
SETS = (("clothing", 10), ("clothing", 30), ("emoji", 30), ("tiles", None), ("clothing", 100))
STRATEGIES = ("FeatureExtraction", "LastStages", "GradualUnfreezing", "FreezeThenUnfreeze", "FullFineTuning")


class NanoDet(ImageBackbone):
    """The ShuffleNet of a detector; its BatchNorm is folded into the convolutions."""

    def __init__(self, root):
        sys.path.insert(0, str(root / "loaders"))
        import nanodet_m

        net = nanodet_m.NanoDet()
        net.load_state_dict(load_file(next((root / "weights/nanodet_m").glob("*.safetensors"))))
        part = net.backbone
        stages = nn.Sequential(nn.Sequential(part.conv1, part.maxpool), part.stage2, part.stage3, part.stage4)
        mean, std = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)  # of blue, green, red
        super().__init__(stages, 464, [v / 255 for v in mean], [v / 255 for v in std])

    def preprocess(self, images):
        return super().preprocess(images.expand(-1, 3, -1, -1).flip(1))

    def stages(self):
        return list(self.model.children())


class MobileNet(ImageBackbone):
    """timm's MobileNetV1 with the width 0.75."""

    def __init__(self, root):
        from timm.models.efficientnet import _gen_mobilenet_v1

        net = _gen_mobilenet_v1("mobilenetv1_100", 0.75, pad_type="same", bn_eps=1e-3)
        net.load_state_dict(load_file(root / "weights/mobilenetv1_075-imagenet.safetensors"))
        net.reset_classifier(0)
        super().__init__(net, net.num_features, [0.5] * 3, [0.5] * 3)

    def stages(self):
        stem = nn.ModuleList([self.model.conv_stem, self.model.bn1])
        return [stem, *self.model.blocks]


def squeezenet(root):
    return TorchvisionBackbone("squeezenet1_0", weights=str(root / "weights/squeezenet1_0-imagenet-fp16.safetensors"))


BACKBONES = {"SqueezeNet": squeezenet, "MobileNetV1": MobileNet, "NanoDet": NanoDet}


def square(image, size):
    """Crops the middle of an image, (size, size, 3)."""
    image = image.convert("RGB")
    scale = size / min(image.size)
    image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    return np.array(image.crop((left, top, left + size, top + size)))


def arrays(root, size):
    """Returns name -> split -> images and labels."""
    found = {"clothing": {}, "emoji": {}, "tiles": {}}
    for split, folder in (("train", "train"), ("val", "validation"), ("test", "test")):
        files = sorted((root / "clothing" / folder).glob("*/*.jpg"))
        classes = sorted({f.parent.name for f in files})
        found["clothing"][split] = (
            [square(Image.open(f), size) for f in files],
            [classes.index(f.parent.name) for f in files],
        )
    with (root / "emoji/emoji.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    with np.load(root / "emoji/google_32.npz") as stored:
        drawn = stored[stored.files[0]]
    kinds = sorted({row["category"] for row in rows})
    for split in ("train", "val", "test"):
        own = [i for i, row in enumerate(rows) if row["split"] == split]
        found["emoji"][split] = (
            [square(Image.fromarray(drawn[i]), size) for i in own],
            [kinds.index(rows[i]["category"]) for i in own],
        )
    files = sorted((root / "magnetic_tile").glob("*/*.jpg"))
    kinds = sorted({f.parent.name for f in files})
    labels = np.array([kinds.index(f.parent.name) for f in files])
    random, parts = np.random.default_rng(0), {"test": [], "val": [], "train": []}
    for kind in range(len(kinds)):
        own = random.permutation(np.flatnonzero(labels == kind))
        ends = len(own) * 3 // 10, len(own) * 4 // 10
        for split, part in zip(parts, np.split(own, ends), strict=True):
            parts[split] += part.tolist()
    for split, part in parts.items():
        found["tiles"][split] = [square(Image.open(files[i]), size) for i in part], labels[part].tolist()
    return found


def write(root, folder, size):
    for name, splits in arrays(root, size).items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, (images, labels) in splits.items():
            np.save(folder / name / f"{split}_images.npy", np.stack(images))
            np.save(folder / name / f"{split}_labels.npy", np.array(labels))


def accuracy(predict, loader):
    hits = [predict(x) == y for batch in loader for x, y, _ in batch.values()]
    return float(torch.cat(hits).float().mean())


def lda(backbone, data):
    """Fits scikit-learn's shrinkage LDA on the frozen backbone's features of the same training images."""
    backbone.eval()
    features = lambda x: backbone(x).numpy()  # noqa: E731
    (loader,) = data.train_dataloader().flattened
    with torch.no_grad():
        xs, ys, _ = zip(*loader.plain(list(range(len(loader.dataset)))), strict=True)
        fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
        fitted.fit(np.concatenate([features(x) for x in xs]), torch.cat(ys).numpy())
        return accuracy(lambda x: torch.from_numpy(fitted.predict(features(x))), data.test_dataloader())


def fit(backbone, data, strategy, seed, epochs):
    seed_everything(seed, verbose=False)
    finetuning = getattr(tl_modules, strategy)()
    module = Classification(backbone, data.schema, finetuning=finetuning)
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="val/accuracy", mode="max")
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = Trainer(max_epochs=epochs, callbacks=[best, FeatureCache()], num_sanity_val_steps=0, **quiet)
        trainer.fit(module, data)
        module.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    module.eval()
    with torch.no_grad():
        return accuracy(lambda x: module(x).argmax(1), data.test_dataloader())


def table(rows):
    """Prints means over seeds in Markdown, and the difference to `FeatureExtraction` with its standard error."""
    ways = ("LDA", *STRATEGIES)
    print("| data, a class | backbone | " + " | ".join(ways) + " |\n|" + " --- |" * (len(ways) + 2))
    low, over_all = [], {way: [] for way in ways}
    for data, backbone in dict.fromkeys((row["data"], row["backbone"]) for row in rows):
        found = {way: {} for way in ways}
        for row in rows:
            if (row["data"], row["backbone"]) == (data, backbone):
                found[row["way"]][row["seed"]] = row["accuracy"]
        cells = []
        for way, by in found.items():
            cells.append(f"{statistics.mean(by.values()):.3f}" if by else "")
            against = found["FeatureExtraction"]
            pairs = [by[seed] - against[seed] for seed in by if seed in against]
            over_all[way] += [statistics.mean(pairs)] if pairs else []
            if len(pairs) > 1 and way not in ("LDA", "FeatureExtraction"):
                error = statistics.stdev(pairs) / len(pairs) ** 0.5
                cells[-1] += f" ({statistics.mean(pairs):+.3f}, se {error:.3f})"
                if statistics.mean(pairs) < -error:
                    low.append(f"{data}, {backbone}, {way}")
        print(f"| {data} | {backbone} | " + " | ".join(cells) + " |")
    print("below FeatureExtraction by more than a standard error: " + ("; ".join(low) or "none"))
    for way, means in over_all.items():
        if len(means) > 1 and way != "FeatureExtraction":
            error = statistics.stdev(means) / len(means) ** 0.5
            print(f"{way} - FeatureExtraction over {len(means)} rows: {statistics.mean(means):+.3f} (se {error:.3f})")


def main():
    args = training_options(__doc__, "defaults.jsonl", 3, 96).parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    root = args.data.resolve()
    rows = rows_of(args.out)
    with tempfile.TemporaryDirectory() as folder:
        write(root, Path(folder), args.size)
        for (name, count), seed, backbone in itertools.product(SETS, range(args.seeds), BACKBONES):
            for way in ("LDA", *STRATEGIES):
                row = {"data": f"{name} {count or ''}".strip(), "backbone": backbone, "way": way, "seed": seed}
                if any(row.items() <= done.items() for done in rows):
                    continue
                data = ImageArrays(Path(folder) / name, shots_per_class=count, seed=seed)
                _ = data.class_names  # reads
                net = BACKBONES[backbone](root)
                found = lda(net, data) if way == "LDA" else fit(net, data, way, seed, args.epochs)
                rows.append({**row, "accuracy": found})
                with args.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(rows[-1], flush=True)
    table(rows)


if __name__ == "__main__":
    main()
