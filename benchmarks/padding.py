"""Measures what batches of texts of similar length save beside random batches: padding and time.

    python benchmarks/padding.py --encoder FOLDER_OR_NAME ZIP ZIP ...

A case is an epoch of the training texts in batches of 32; the time is processor time, for `--steps` of these batches
forwards and backwards through the whole encoder. No weights are updated.
"""

import argparse
import os
import time
from pathlib import Path

import torch
from common import report

from datamodules import TextFiles
from datamodules.loaders import EpochSampler
from tl_modules import TransformerBackbone

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("texts", nargs="+", type=Path)
parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2")
parser.add_argument("--windows", type=int, default=1, help="Of 512 tokens, beyond which a text is cut off.")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", type=Path)


def main():
    """Measures each file of texts with and without length batching."""
    options = parser.parse_args()
    encoder, rows = TransformerBackbone(options.encoder, windows=options.windows), []
    for path in options.texts:
        padded, seconds = {}, {}
        for side, chunk in (("ours", EpochSampler.chunk), ("theirs", 1)):  # a chunk of one batch leaves it as drawn
            data = TextFiles(path, encoding="latin-1")
            data.collate = lambda samples: encoder.prepare([x for x, *_ in samples])
            loader = data.train_dataloader().iterables["target"]
            loader.sampler.chunk = chunk
            batches = list(loader)
            padded[side] = 1 - sum(int(b.lengths.sum()) for b in batches) / sum(b.values.numel() for b in batches)
            seconds[side] = sum(step(encoder, batch) for batch in batches[: options.steps])
        rows.append({"case": f"{path.stem}, share padded", "wanted": "", **padded})
        if options.steps:
            rows.append({"case": f"{path.stem}, {options.steps} steps, s", "wanted": "", **seconds})
    report(rows, options.out)


def step(encoder, batch):
    """Returns the processor seconds of a forward and a backward pass."""
    start = time.process_time()
    encoder.pooled_features(encoder(batch)).sum().backward()
    return time.process_time() - start


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    main()
