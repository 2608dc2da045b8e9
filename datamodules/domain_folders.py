"""Folders with one subfolder per domain: Office-31, Office-Home, PACS, VisDA-2017, DomainNet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from datamodules.errors import DataError, check_known
from datamodules.folders import class_folders
from datamodules.image import ImageFolders
from datamodules.paths import expand_path


class DomainFolders(ImageFolders):
    """One folder per domain, each with one folder per class.

        Office-31     amazon/images/<class>  dslr/...  webcam/...      (or amazon/<class>)
        Office-Home   Art/<class>  Clipart/...  Product/...  "Real World"/...
        PACS          art_painting/<class>  cartoon/...  photo/...  sketch/...
        VisDA-2017    train/<class>  validation/<class>                source train, target validation
        DomainNet     clipart/<class>  ...  with clipart_train.txt and clipart_test.txt beside them

    Each domain is split in three by the seed, the target without its labels if they are hidden. If DomainNet's lists
    are there, they name the test images, and the training images, of which a part is for validation; an image's class
    is its folder. Files beside the folders and hidden files are ignored.

    Args:
        root: The folder of the domains; ~ and $VARIABLES are expanded.
        target: The target's name; None: there is none.
        sources: The sources' names; None takes all other domains, [] takes none.
        **kwargs: As for `ImageFolders`.

    Raises:
        DataError: A domain is unknown; otherwise as `ImageFolders`.
    """

    def __init__(
        self, root: Path | str, target: str | None = None, sources: list[str] | None = None, **kwargs: Any
    ) -> None:
        path = expand_path(root, "root")
        assert path is not None
        self.root, folders = path, domain_folders(path)
        if not folders:
            raise DataError(f"root: {path} has no domains; it needs {path}/<domain>/<class>/*.jpg")
        others = [name for name in folders if name != target]
        if target is not None:
            check_known("target", target, folders)
        for name in sources or []:
            check_known("sources", name, others)
        chosen = others if sources is None else sources
        super().__init__(
            target=None if target is None else folders[target],
            source={name: folders[name] for name in chosen} or None,
            **kwargs,
        )

    def _folders(self, name: str) -> dict[str, Path]:
        return {"unsplit": self.roots[name]}  # VisDA has a class named train

    def parts(self, name: str) -> Mapping[str, Dataset[Any]]:
        """Returns the images of a domain by DomainNet's lists, if they exist."""
        domain = self.roots[name].relative_to(self.root).parts[0]
        lists = {split: self.root / f"{domain}_{split}.txt" for split in ("train", "test")}
        there = [file for file in lists.values() if file.is_file()]
        if not there:
            return super().parts(name)
        if len(there) < len(lists):
            missing = next(file for file in lists.values() if file not in there)
            raise DataError(f"{name}: {there[0]} is there, but not {missing.name}; add it, or remove {there[0]}")
        return {split: self._listed(file, name) for split, file in lists.items()}

    def _listed(self, file: Path, name: str) -> Dataset[Any]:
        """Returns the images that a file lists, one `domain/class/image.jpg label` per line."""
        numbers = {label: number for number, label in enumerate(self.class_names or [])}
        lines = [line.rpartition(" ")[0] for line in file.read_text().splitlines() if line.strip()]
        paths = [self.root / line for line in lines]
        unknown = sorted({path.parent.name for path in paths} - set(numbers))
        if unknown:
            raise DataError(f"{name}: {file} names classes that have no folder: {', '.join(unknown[:5])}")
        return self._images(paths, [numbers[path.parent.name] for path in paths], name)


def domain_folders(root: Path) -> dict[str, Path]:
    """Returns the domains below `root`: each name and the folder that holds its class folders."""
    found = {}
    for name in class_folders(root):
        images = root / name / "images"
        folder = images if images.is_dir() and class_folders(images) else root / name
        if class_folders(folder):
            found[name] = folder
    return found
