"""Paths that arguments name."""

from __future__ import annotations

import os
from pathlib import Path

from datamodules.errors import DataError


def fill_in(path: str | os.PathLike[str]) -> Path:
    """A path with ~ and $VARIABLES filled in, unless there is one that is written just so."""
    return Path(path) if os.path.lexists(path) else Path(os.path.expandvars(path)).expanduser()


def expand_path(path: str | os.PathLike[str] | None, field: str) -> Path | None:
    """A path with ~ and $VARIABLES filled in.

    Raises:
        DataError: A variable is not set, or nothing is there.
    """
    if path is None:
        return None
    full = fill_in(path)
    if "$" in str(full) and not full.exists():
        raise DataError(f"{field}: {path} uses a variable that is not set; export it, or pass --data.{field} PATH")
    if not full.exists():
        raise DataError(f"{field}: there is no file or folder {full}")
    return full
