"""Measures the memory that a large file of word vectors takes: a synthetic one in GloVe's format, in its own process.

    python benchmarks/word_vectors.py --gigabytes 2 [--keep 200000]

prints the words kept, the size of their vectors and texts, and the peak of the process above its memory
before the file was opened.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WIDTH = 300


def write(path: Path, size: float) -> int:
    """Writes `size` bytes of lines; all blocks have the same numbers, but different words."""
    numbers = np.random.default_rng(0).normal(size=(1000, WIDTH)).round(5)
    lines = [" ".join(f"{value:.5f}" for value in row) for row in numbers]
    count = written = 0
    with path.open("w") as file:
        while written < size:
            for line in lines:
                written += file.write(f"word{count} {line}\n")
                count += 1
    return count


def measure(path: Path, keep: int | None) -> None:
    import torch  # noqa: F401

    from tl_modules.backbones.word_vectors import read_vectors

    before, start = peak(), time.perf_counter()
    words, vectors = read_vectors(path, keep)
    own = vectors.nbytes + sum(map(sys.getsizeof, words)) + sys.getsizeof(words)
    taken = peak() - before
    print(
        f"{len(words)} words kept; {own / 1e6:.0f} MB of vectors and words; peak {taken / 1e6:.0f} MB more than before"
    )
    print(f"{(taken - own) / 1e6:.0f} MB above their own size, {time.perf_counter() - start:.0f} s")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--keep", type=int)
    parser.add_argument("--file", type=Path)
    given = parser.parse_args()
    if given.file:
        measure(given.file, given.keep)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "glove.txt"
            print(f"{write(path, given.gigabytes * 1e9)} words in {path.stat().st_size / 1e9:.2f} GB")
            keep = ["--keep", str(given.keep)] if given.keep else []
            subprocess.run([sys.executable, __file__, "--file", path, *keep], check=True)
