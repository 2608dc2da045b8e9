"""Folders as people and systems leave them: which names are litter, which folders are classes, what is in them."""

from __future__ import annotations

import os
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from datamodules.errors import DataError
from datamodules.splits import SPLITS, log, split_of

LITTER = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "desktop.ini", "thumbs.db")


def is_litter(name: str) -> bool:
    """Returns whether a name is hidden (.DS_Store, ._0.jpg, .ipynb_checkpoints), or left behind by a system."""
    return name.startswith(".") or name.casefold() in LITTER


def files_below(root: Path | str) -> Iterator[str]:
    """Yields the files below a folder as paths relative to it, with /, sorted by name; litter is left out.

    Links are followed, except those to a folder that contains them. Pipes, sockets and devices are counted and told.

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
            elif entry.is_file() or not os.path.exists(entry.path):  # reading a broken link says so
                yield below + entry.name
            else:
                others.append(below + entry.name)

    others: list[str] = []
    yield from enter(str(root), "", ())
    if others:
        log.warning("%s: left out %d pipes, sockets or devices, e.g. %s", root, len(others), others[0])


def files_listed(listing: Path) -> list[str]:
    """Reads the files that a text names, one per line, relative to its folder; as sorted as `files_below`.

    `find -L . -type f > files.txt` writes such a list. Where a tree has millions of files, all processes of a run then
    read one file instead of every folder.

    Raises:
        DataError: The list cannot be read, is empty, or names a file elsewhere.
    """
    try:
        lines = listing.read_bytes().removeprefix(BOM_UTF8).splitlines()
    except OSError as error:
        raise DataError(f"{listing}: it cannot be read ({error.strerror})") from error
    names = {os.fsdecode(line).removeprefix("./") for line in lines if line.strip()}
    for name in names:
        if name.startswith("/") or ".." in name.split("/"):
            raise DataError(
                f"{listing}: {name} is not below {listing.parent}; write paths relative to the list's folder"
            )
    found = [name for name in names if not any(map(is_litter, name.split("/"))) and name != listing.name]
    if not found:
        raise DataError(f"{listing}: it names no files; write one path per line, relative to the list's folder")
    return sorted(found, key=lambda name: name.replace("/", "\0"))  # as if folder by folder


def folders_listed(root: Path, names: Iterable[str]) -> dict[Path, list[str]]:
    """Returns the class folders of the upper folders of a tree that has only the files of these names."""
    below: dict[Path, set[str]] = {}
    for folders in {tuple(name.split("/", 2)[:-1]) for name in names}:
        for depth, folder in enumerate(folders):
            below.setdefault(root.joinpath(*folders[:depth]), set()).add(folder)
    return {folder: sorted(names) for folder, names in below.items()}


def class_folders(folder: Path, known: Mapping[Path, list[str]] | None = None) -> list[str]:
    """Returns the names of the subfolders of a folder, sorted, without litter; [] for a file.

    Args:
        folder: The folder.
        known: The subfolders of each folder, if they have been listed.
    """
    if known is not None:
        return known.get(folder, [])
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not is_litter(p.name)) if folder.is_dir() else []


def split_folders(root: Path, known: Mapping[Path, list[str]] | None = None) -> dict[str, Path]:
    """Returns the split folders of a tree by split; {} if its folders are classes.

    Args:
        root: The tree.
        known: The folders in each of its folders, if they have been listed.

    Raises:
        DataError: A split has two folders, or split folders without classes lie beside other folders.
    """
    found: dict[str, list[str]] = {}
    others = []
    for name in class_folders(root, known):
        if (split := split_of(name)) is not None:
            found.setdefault(split, []).append(name)
        else:
            others.append(name)
    for split, names in found.items():
        if len(names) > 1:
            raise DataError(f"{root}: {' and '.join(names)} are both folders of {split} images; keep one")
    folders = {split: root / found[split][0] for split in SPLITS if split in found}
    if folders and others and not any(class_folders(folder, known) for folder in folders.values()):
        if list(folders) == ["train"]:  # a class: car, plane, train
            return {}
        names = [folder.name for folder in folders.values()]
        raise DataError(
            f"{root}: {' and '.join(names)} look like splits and {', '.join(others[:3])} like classes; put the classes "
            f"into {root}/train, or rename {names[0]}"
        )
    return folders
