"""Domains whose files may say how they are split; what they leave open is split by the seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch.utils.data import Dataset

from datamodules.base import TransferDataModule
from datamodules.errors import DataError
from datamodules.splits import SPLIT_NAMES, complete_splits


class FileDomains(TransferDataModule):
    """Domains that are read from files; a subclass sets `wheres` and writes `parts`.

    Args:
        val_fraction: Share for validation, where nothing else is said.
        test_fraction: Share for testing, where nothing else is said.
        **kwargs: As for `TransferDataModule`.

    Attributes:
        wheres: What messages call the files of each domain, by its name, e.g. {"target": "target: wine.csv"}.
        split_is: What they call a split that is not there.
    """

    wheres: Mapping[str, str]
    split_is: ClassVar[str] = "{split} split"

    def __init__(self, val_fraction: float = 0.2, test_fraction: float = 0.2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not (0 < val_fraction < 1 and 0 < test_fraction < 1 and val_fraction + test_fraction < 1):
            raise DataError(
                f"val_fraction, test_fraction: {val_fraction} and {test_fraction} must be above 0 and below 1 together"
            )
        self.fractions = val_fraction, test_fraction
        self._splits: dict[str, Mapping[str, Dataset[Any]]] = {}

    def parts(self, name: str) -> Mapping[str, Dataset[Any]]:
        """The data set of each split that a domain's files name, or of all there is, as "unsplit"."""
        raise NotImplementedError

    def whole(self) -> Dataset[Any] | None:
        """All samples of the target, if there is one and its files say nothing of splits."""
        return self.parts("target").get("unsplit") if "target" in self.wheres else None

    def splits(self, name: str) -> Mapping[str, Dataset[Any]]:
        """The data set of each split of a domain, the same objects each time."""
        if name not in self._splits:
            stratified = self.stratifies(name, self.wheres)
            self._splits[name] = complete_splits(
                self.parts(name), self.wheres[name], *self.fractions, self.seed, stratified
            )
        return self._splits[name]

    def domains(self, split: str) -> Mapping[str, Dataset[Any]]:
        """The split's samples in each domain."""
        for name, where in self.wheres.items():
            if split not in self.splits(name):
                missing = self.split_is.format(split=split, names=" or ".join(SPLIT_NAMES[split]))
                raise DataError(f"{where} has no {missing}")
        return {name: self.splits(name)[split] for name in self.wheres}

    def wrapped(self, seed: int, blind: bool) -> None:
        """Takes both; splits by another seed are made anew."""
        super().wrapped(seed, blind)
        self._splits.clear()

    def predict_dataloader(self) -> Any:
        """The target's test split, or all its samples where nothing says how they are split; without labels."""
        if (whole := self.whole()) is not None:
            self._domains["test"] = {"target": whole}
        return super().predict_dataloader()
