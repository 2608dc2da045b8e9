"""Paths given as arguments."""

from __future__ import annotations

import os
from pathlib import Path

from datamodules.errors import DataError


def fill_in(path: str | os.PathLike[str]) -> Path:
    """Expands ~ and $VARIABLES in a path, unless a path of exactly this name exists."""
    return Path(path) if os.path.lexists(path) else Path(os.path.expandvars(path)).expanduser()


def expand_path(path: str | os.PathLike[str] | None, field: str) -> Path | None:
    """Expands ~ and $VARIABLES in a path that must exist.

    Raises:
        DataError: A variable is not set, or the path does not exist.
    """
    if path is None:
        return None
    full = fill_in(path)
    if "$" in str(full) and not full.exists():
        raise DataError(f"{field}: {path} uses a variable that is not set; export it, or pass --data.{field} PATH")
    if not full.exists():
        raise DataError(f"{field}: there is no file or folder {full}")
    return full
