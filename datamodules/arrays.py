"""Arrays that may be larger than memory: above a size they live in a temporary file, paged in and out by the system."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import numpy as np

LARGE = 256 << 20  # bytes


def empty_array(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """Allocates an uninitialised array.

    If it is larger than 256 MiB, it is memory-mapped from an unlinked file in the folder for temporary files (set
    TMPDIR to choose another disk), which disappears with its last user.
    """
    if math.prod(shape) * np.dtype(dtype).itemsize <= LARGE:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype, "w+", shape=shape)
