"""Makes the paths of a config absolute, so that config.yaml works from anywhere."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, get_args, get_type_hints

from jsonargparse import Namespace

from tl_modules.checkpoints.files import fill_in
from tl_modules.cli.messages import import_class


def absolute_paths(config: Any) -> None:
    """Makes every argument that is an existing path absolute, in place, at all levels.

    Paths are arguments annotated as paths, and `weights`, which a user's backbone may annotate as text.
    """
    if isinstance(config, list):
        for item in config:
            absolute_paths(item)
    if not isinstance(config, Namespace) or not isinstance(config.get("init_args"), Namespace):
        return
    hints: dict[str, Any] = {}
    for parent in reversed(import_class(config.class_path).__mro__):
        if "__init__" in vars(parent):
            with contextlib.suppress(NameError, TypeError):  # a name that is imported only for type checkers
                hints |= get_type_hints(parent.__init__)
    for key, value in vars(config.init_args).items():
        is_path = key == "weights" or Path in (hints.get(key), *get_args(hints.get(key)))
        if isinstance(value, str | Path) and is_path:
            config.init_args[key] = _absolute(value)
        elif isinstance(value, dict) and "Path" in str(hints.get(key)):
            config.init_args[key] = {name: _absolute(each) for name, each in value.items()}
        elif isinstance(value, list) and "Path" in str(hints.get(key)):
            config.init_args[key] = [_absolute(each) for each in value]
        else:
            absolute_paths(value)


def _absolute(path: str | Path) -> str:
    full = fill_in(path)
    return os.path.abspath(full) if full.exists() else str(path)
