"""Domains whose files may define their splits; what they leave open is split by the seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any, ClassVar

from torch.utils.data import Dataset

from datamodules.base import TransferDataModule
from datamodules.decoding import FolderImages
from datamodules.errors import DataError, printable
from datamodules.files import FileSamples, find_copies
from datamodules.near_copies import MOST, SECONDS, find_near_copies
from datamodules.splits import SPLIT_NAMES, SPLITS, Subset, complete_splits, ids_of, log, named_labels

BETTER = "results will look better than they are"


class FileDomains(TransferDataModule):
    """Domains that are read from files; a subclass sets `wheres` and writes `parts`.

    Args:
        val_fraction: Share of the samples for validation, if the files do not define it.
        test_fraction: Share for testing, if the files do not define it; 1 takes all samples for `tl test`.
        **kwargs: As for `TransferDataModule`.

    Attributes:
        wheres: The files of each domain for messages, by its name, e.g. {"target": "target: wine.csv"}.
        split_is: What messages call a missing split.
    """

    wheres: Mapping[str, str]
    split_is: ClassVar[str] = "{split} split"

    def __init__(self, val_fraction: float = 0.2, test_fraction: float = 0.2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if test_fraction != 1 and not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
            raise DataError(
                f"val_fraction, test_fraction: {val_fraction} and {test_fraction} must be above 0 and below 1 together "
                "(a test_fraction of 1 takes all for testing)"
            )
        self.fractions = val_fraction, test_fraction
        self._splits: dict[str, Mapping[str, Dataset[Any]]] = {}

    def parts(self, name: str) -> Mapping[str, Dataset[Any]]:
        """Returns the data set of each split that a domain's files define, or everything as "unsplit"."""
        raise NotImplementedError

    def whole(self) -> Dataset[Any] | None:
        """Returns all samples of the target, if there is one and its files do not define several splits."""
        parts = list(self.parts("target").values()) if "target" in self.wheres else []
        return parts[0] if len(parts) == 1 else None

    def setup(self, stage: str) -> None:
        """Also warns of files that are in several splits, before training."""
        super().setup(stage)
        if stage == "fit" and (self.trainer is None or self.trainer.is_global_zero):
            self.warn_of_copies()

    def warn_of_copies(self) -> None:
        """Warns of files and images that are also in another split, and of files that are also in another class."""
        files: dict[str, list[str]] = {split: [] for split in SPLITS}
        by_class: dict[tuple[str, str], list[str]] = {}
        seen: list[Dataset[Any]] = []
        for name in self.wheres:
            for split, part in self.splits(name).items():
                whole = part.dataset if isinstance(part, Subset) else part
                if isinstance(whole, FileSamples) and not any(part is other for other in seen):
                    files[split] += (paths := ids_of(part))
                    labels = named_labels(part, self.class_names) if self.class_names else repeat("")
                    for path, label in zip(paths, labels, strict=False):
                        by_class.setdefault((split, label), []).append(path)
                    seen.append(part)
        groups = find_copies(by_class)
        copies = _several([(split, path) for (split, _), path in group] for group in groups)
        _warn_of(copies, "%d files are in several splits, byte for byte", BETTER)
        inside = ([(label, path) for (each, label), path in group if each == s] for group in groups for s in SPLITS)
        _warn_of(_several(inside), "%d files are in several classes of a split, byte for byte", "one label is wrong")
        images = [part.dataset if isinstance(part, Subset) else part for part in seen]
        if images and isinstance(images[0], FolderImages):
            same = {path: number for number, group in enumerate(copies) for _, path in group}
            pairs, compared = find_near_copies(files, images[0].thumbnail)
            pairs = [pair for pair in pairs if len({same.get(path, path) for _, path in pair}) > 1]
            _warn_of(pairs, "%d pairs of images in different splits look the same", BETTER)
            if compared < (total := sum(map(len, files.values()))):
                told = "searched %d of %d images for those that look the same (at most %d, in %g seconds)"
                log.info(told, compared, total, MOST, SECONDS)

    def splits(self, name: str) -> Mapping[str, Dataset[Any]]:
        """Returns the data set of each split of a domain, the same objects each time."""
        if name not in self._splits:
            stratified = self.stratifies(name, self.wheres)
            self._splits[name] = complete_splits(
                self.parts(name), self.wheres[name], *self.fractions, self.seed, stratified
            )
        return self._splits[name]

    def domains(self, split: str) -> Mapping[str, Dataset[Any]]:
        """Returns the split's samples in each domain."""
        for name, where in self.wheres.items():
            if split not in self.splits(name):
                missing = self.split_is.format(split=split, names=" or ".join(SPLIT_NAMES[split]))
                raise DataError(f"{where} has no {missing}")
            if not len(self.splits(name)[split]) and split not in self.parts(name):  # type: ignore[arg-type]
                few = "no class has enough samples for" if self.class_names else "there are too few samples for"
                raise DataError(f"{where}: {few} a {split} split; add samples, or check whether the label is right")
            if not len(self.splits(name)[split]):  # type: ignore[arg-type]
                raise DataError(f"{where}: its {split} split has no samples; fill it, or remove it")
        return {name: self.splits(name)[split] for name in self.wheres}

    def wrapped(self, seed: int, blind: bool) -> None:
        """Takes over both; splits made with another seed are made again."""
        super().wrapped(seed, blind)
        self._splits.clear()

    def predict_dataloader(self) -> Any:
        """Loads the target's test split, or all its samples if nothing defines splits; without labels."""
        if (whole := self.whole()) is not None:
            self._domains["test"] = {"target": whole}
        return super().predict_dataloader()


def _several(groups: Iterable[list[tuple[str, str]]]) -> list[list[tuple[str, str]]]:
    """Returns the groups of (name, path) that have several names."""
    return [group for group in groups if len({name for name, _ in group}) > 1]


def _warn_of(groups: Sequence[Sequence[tuple[str, str]]], what: str, so: str) -> None:
    """Warns of groups of (name, path), with an example and what it means."""
    if groups:
        (one, first), *others = groups[0]
        other, second = next(each for each in others if each[0] != one)
        where = printable(f"{first} ({one}) and {second} ({other})")
        log.warning(f"{what}, e.g. %s: {so}", len(groups), where)
