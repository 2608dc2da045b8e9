"""Domains with different classes: partial and open-set adaptation made from any data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from datamodules.base import TransferDataModule
from datamodules.errors import DataError, check_known
from datamodules.splits import Subset, check_labelled, content_hash, targets_of

UNKNOWN = "unknown"


class ClassSubset(TransferDataModule):
    """Another datamodule whose domains keep only some of their classes.

        all of the source, some of the target      partial adaptation (Cao et al., ECCV 2018)
        some of the source, all of the target,
        open_set                                   open-set adaptation (Panareda Busto and Gall, ICCV 2017)

    Class numbers stay those of the whole list, unless `open_set`: then the classes are the source's and, last,
    "unknown", the label of every target sample of another class. Office-31's usual open-set task is

        data:
          class_path: ClassSubset
          init_args:
            open_set: true
            source: [back_pack, bike, bike_helmet, bookcase, bottle, calculator, desk_chair, desk_lamp, ...]
            data: {class_path: DomainFolders, init_args: {root: office31, target: webcam, sources: [amazon]}}

    Labels decide which rows stay, even if they are hidden; nothing else sees them. `data` makes the splits; its other
    settings (batch size, shots, ...) are not used. If its folders have different classes, list all classes in its
    `classes`.

    Args:
        data: Any datamodule whose labels are classes.
        source: The classes that every source keeps; None: all.
        target: The classes that the target keeps; None: all.
        open_set: Merges target classes that the source lacks into one class, "unknown".
        num_workers: Processes that load data; None is as many as `data` has.
        seed: Seeds the splits of `data`, shots and shuffling; None takes the seed of `data`.
        **kwargs: As for `TransferDataModule`.

    Raises:
        DataError: The labels are not classes, a class is unknown, or a domain has no samples left.
    """

    def __init__(
        self,
        data: TransferDataModule,
        source: list[str] | None = None,
        target: list[str] | None = None,
        open_set: bool = False,
        num_workers: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        workers = data.num_workers if num_workers is None else num_workers
        super().__init__(num_workers=workers, seed=data.seed if seed is None else seed, **kwargs)
        if data.class_names is None:
            raise DataError(f"data: the labels of {type(data).__name__} are not classes")
        names = data.class_names
        for field, given in (("source", source), ("target", target)):
            for name in given or []:
                check_known(field, name, names, "class")
        kept = {"source": names if source is None else source, "target": names if target is None else target}
        self.class_names = names
        if open_set:
            if UNKNOWN in kept["source"]:
                raise DataError(f"open_set: the source already has a class {UNKNOWN}; rename it")
            self.class_names = [*(name for name in names if name in kept["source"]), UNKNOWN]
        new = {name: number for number, name in enumerate(self.class_names)}
        # class of the data -> its number here, for each domain's classes
        self.numbers = {
            domain: {number: new.get(name, len(new) - 1) for number, name in enumerate(names) if name in those}
            for domain, those in kept.items()
        }
        self.data = data
        data.wrapped(self.seed, self.blind)
        self.x_schema, self.photos = data.x_schema, data.photos  # the schema is learnt last
        self._kept: dict[tuple[str, int], ClassSubsetDataset] = {}

    def wrapped(self, seed: int, blind: bool) -> None:
        """Passes both on to `data`."""
        super().wrapped(seed, blind)
        self.data.wrapped(seed, blind)

    def domains(self, split: str) -> Mapping[str, Dataset[Any]]:
        """Returns the split's samples of the classes that each domain keeps."""
        return {name: self._keep(name, dataset, split) for name, dataset in self.data.split_domains(split).items()}

    def _keep(self, name: str, dataset: Dataset[Any], split: str) -> Dataset[Any]:
        key = name, id(dataset)  # two splits may be the same data set
        if key not in self._kept:
            self._kept[key] = ClassSubsetDataset(dataset, self.numbers[name.partition("/")[0]])
            if not len(self._kept[key]):
                raise DataError(f"{name.partition('/')[0]}: no {split} sample of {name} has one of these classes")
        return self._kept[key]


class ClassSubsetDataset(Subset):
    """The rows of a data set whose class has a new number, with that number as their label.

    Args:
        dataset: Has class numbers as labels.
        numbers: Old number -> new number.
    """

    def __init__(self, dataset: Dataset[Any], numbers: Mapping[int, int]) -> None:
        check_labelled(dataset)
        super().__init__(dataset, np.flatnonzero(np.isin(targets_of(dataset), list(numbers))).tolist())
        self.targets = np.array([numbers[int(old)] for old in self.targets], dtype=np.int64)

    def fingerprint(self) -> str | None:
        """Returns a hash of the contents."""
        inner = super().fingerprint()
        return inner and content_hash(inner, self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return super().__getitem__(index)[0], int(self.targets[index])

    def augmented(self, index: int, transform: Callable[[Any], Any]) -> tuple[Any, int]:
        """Returns the sample, augmented by the data set."""
        return super().augmented(index, transform)[0], int(self.targets[index])
