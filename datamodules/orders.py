"""Random orders of samples that depend on numbers and names only, in constant memory if there are many samples."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
STORED = 1 << 20  # up to this size an order is drawn at once, which is faster
ROUNDS = 6


def generator_of(*parts: int | str) -> np.random.Generator:
    """Returns a generator seeded by numbers and names, each of which selects another stream."""
    return np.random.default_rng([zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts])


class Order:
    """A random order of the numbers below `size`, with a seed for each; any slice of it can be computed.

    Above a million each position is computed separately, so that neither memory nor the start of an epoch grows with
    the data: a Feistel network permutes the numbers below the next power of four, and is applied again to results
    outside the range (cycle walking; Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).

    Args:
        size: Number of samples.
        *parts: Seed the order, see `generator_of`.
    """

    def __init__(self, size: int, *parts: int | str) -> None:
        self.size = size
        generator = generator_of(*parts)
        self.stored: Array | None = None
        if size <= STORED:
            order, seeds = generator.permutation(size), generator.integers(2**62, size=size)
            self.stored = np.stack([order, seeds[order]], 1)
        self.keys = generator.integers(2**64, size=ROUNDS + 1, dtype=np.uint64)
        self.half = np.uint64(-(-(size - 1).bit_length() // 2))  # bits of each half of a number

    def __getitem__(self, positions: slice) -> Array:
        """Returns the numbers at these positions and their seeds, int64 (n, 2)."""
        if self.stored is not None:
            return self.stored[positions]
        numbers = self._permuted(np.arange(*positions.indices(self.size), dtype=np.uint64))
        while (out := numbers >= self.size).any():
            numbers[out] = self._permuted(numbers[out])
        return np.stack([numbers, _mixed(numbers ^ self.keys[-1]) >> np.uint64(2)], 1).astype(np.int64)

    def _permuted(self, numbers: Array) -> Array:
        mask = (np.uint64(1) << self.half) - np.uint64(1)
        left, right = numbers >> self.half, numbers & mask
        for key in self.keys[:ROUNDS]:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        permuted: Array = (left << self.half) | right
        return permuted


def _mixed(numbers: Array) -> Array:
    """Hashes to 64 bits (the finaliser of MurmurHash3, as in SplitMix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = numbers ^ (numbers >> np.uint64(31))
    return mixed
