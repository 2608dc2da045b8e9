"""Arrays that may be larger than memory: beyond a size they are in a temporary file, paged in and out by the system."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import numpy as np

LARGE = 256 << 20  # bytes


def empty_array(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """Makes an array that is not filled yet.

    One of more than 256 MiB is in a file without a name in the folder for temporary files (TMPDIR chooses another
    disk), and is gone when nobody uses it any more.
    """
    if math.prod(shape) * np.dtype(dtype).itemsize <= LARGE:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype, "w+", shape=shape)
