"""Folders as people and systems leave them: what is litter, what is a class, which files lie below."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from datamodules.errors import DataError
from datamodules.splits import SPLITS, split_of

LITTER = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "desktop.ini", "thumbs.db")


def is_litter(name: str) -> bool:
    """Whether a name is hidden (.DS_Store, ._0.jpg, .ipynb_checkpoints), or a system has left it behind."""
    return name.startswith(".") or name.casefold() in LITTER


def files_below(root: Path | str) -> Iterator[str]:
    """The files below a folder by their paths in it, with /, in the order of the names; litter is left out.

    Links are followed, but for those to a folder that they lie in.

    Raises:
        DataError: A folder cannot be read.
    """

    def enter(folder: str, below: str, around: tuple[tuple[int, int], ...]) -> Iterator[str]:
        try:
            stat = os.stat(folder)
            if (stat.st_dev, stat.st_ino) in around:
                return
            with os.scandir(folder) as entries:
                known = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{folder}: it cannot be read ({error.strerror})") from error
        for entry in known:
            if is_litter(entry.name):
                continue
            if entry.is_dir():
                yield from enter(entry.path, f"{below}{entry.name}/", (*around, (stat.st_dev, stat.st_ino)))
            else:
                yield below + entry.name

    return enter(str(root), "", ())


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; litter is left out. A file has none."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not is_litter(p.name)) if folder.is_dir() else []


def split_folders(root: Path) -> dict[str, Path]:
    """The split folders of a tree by our name for the split; none where its folders are classes.

    Raises:
        DataError: There are two of a split, or it has folders of splits without classes beside others.
    """
    found: dict[str, list[str]] = {}
    others = []
    for name in class_folders(root):
        if (split := split_of(name)) is not None:
            found.setdefault(split, []).append(name)
        else:
            others.append(name)
    for split, names in found.items():
        if len(names) > 1:
            raise DataError(f"{root}: {' and '.join(names)} are both folders of {split} images; keep one")
    folders = {split: root / found[split][0] for split in SPLITS if split in found}
    if folders and others and not any(map(class_folders, folders.values())):
        if list(folders) == ["train"]:  # vehicles: car, plane, train
            return {}
        names = [folder.name for folder in folders.values()]
        raise DataError(
            f"{root}: {' and '.join(names)} look like splits and {', '.join(others[:3])} like classes; put the classes "
            f"into {root}/train, or rename {names[0]}"
        )
    return folders
