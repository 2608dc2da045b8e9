"""Images of several splits that look the same: resized, or compressed again.

path -> colour thumbnail, 16 x 16 -> edges correlate beyond ALIKE -> no place differs by DIFFERENCE -> a pair

Edges alone would confuse drawings that differ in colour, and colours alone would confuse flat images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from datamodules.errors import DataError

Array = np.ndarray[Any, Any]
SIDE = 16  # of a thumbnail, in pixels
MOST = 10_000  # images that are compared, at random
SECONDS = 2.0  # for reading thumbnails, and the same for comparing them
ALIKE = 0.98
DIFFERENCE = 16  # of 255
BLOCK = 256  # images compared with all at a time


def find_near_copies(
    files: Mapping[str, Sequence[str]], thumbnail: Callable[[str], Array]
) -> tuple[list[list[tuple[str, str]]], int]:
    """Finds pairs of images of different splits that look the same.

    Args:
        files: The paths of each split.
        thumbnail: Reads an image as (SIDE, SIDE, 3) uint8; images that it rejects are left out.

    Returns:
        Pairs of (split, path), and how many images were compared with each other.
    """
    known = [(split, path) for split, paths in files.items() for path in paths]
    chosen = [known[row] for row in np.random.default_rng(0).permutation(len(known))[:MOST]]
    end = time.monotonic() + SECONDS

    def read(path: str) -> Array | None:
        try:
            return thumbnail(path) if time.monotonic() < end else None
        except DataError:  # training says so
            return None

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(read, [path for _, path in chosen]))
    rows = [row for row, image in enumerate(found) if image is not None]
    if not rows:
        return [], 0
    images = np.stack([image for image in found if image is not None])
    splits = np.array([chosen[row][0] for row in rows])
    edges = _edges(images)
    pairs, end = list[list[tuple[str, str]]](), time.monotonic() + SECONDS
    for start in range(0, len(rows), BLOCK):
        if time.monotonic() > end:
            return pairs, start
        near = edges[start : start + BLOCK] @ edges[: start + BLOCK].T > ALIKE
        near &= splits[start : start + BLOCK, None] != splits[: start + BLOCK]
        for row in np.flatnonzero(near.any(1)):
            others = np.flatnonzero(near[row, : start + row])
            apart = np.abs(images[others].astype(np.int16) - images[start + row]).max((1, 2, 3))
            pairs += [[chosen[rows[other]], chosen[rows[start + row]]] for other in others[apart < DIFFERENCE]]
    return pairs, len(rows)


def _edges(images: Array) -> Array:
    """Returns the brightness differences of neighbouring pixels, each image's of length 1, or 0 for a flat one."""
    grey = images @ np.array([0.299, 0.587, 0.114], np.float32)
    parts = [np.diff(grey, axis=axis).reshape(len(images), -1) for axis in (1, 2)]
    edges: Array = np.concatenate(parts, 1)
    length = np.linalg.norm(edges, axis=1, keepdims=True)
    np.divide(edges, length, out=edges, where=length > 1)
    return edges
