"""Cuts data sets into splits, shots and parts; reads their labels and ids; hashes their contents."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from datamodules.errors import DataError, check_known

log = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")
SPLIT = "split"  # the column whose cells name splits
SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
_SPLIT = re.compile(
    r"(?:(?P<train>train|training)|(?P<val>val|valid|validation|dev)|(?P<test>test|testing))[ _-]?(?:set|data|images)?",
    re.IGNORECASE,
)


def split_of(name: str) -> str | None:
    """Returns the split that a name means, in any spelling (Train, training, VALID, test_set), or None."""
    found = _SPLIT.fullmatch(name.strip())
    return found and found.lastgroup


def read_split(field: str, name: str) -> str:
    """Returns the split that a name means.

    Raises:
        DataError: It is not the name of a split.
    """
    split = split_of(name) or name
    check_known(field, split, SPLITS, "split")
    return split


def content_hash(*parts: Any) -> str:
    """Returns the SHA-256 of texts, numbers and arrays, to identify the contents of a data set."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray | Tensor):
            array = np.ascontiguousarray(part)
            total.update(f"{array.shape} {array.dtype} ".encode())
            total.update(array.data if array.size and array.dtype.kind != "O" else repr(array.tolist()).encode())
        else:
            total.update(f"{part!r} ".encode())
    return total.hexdigest()


def ids_of(dataset: Dataset[Any]) -> list[str]:
    """Returns the id of each sample: from the data set's `ids`, or its number."""
    return list(getattr(dataset, "ids", None) or map(str, range(len(dataset))))  # type: ignore[arg-type]


def groups_of(dataset: Dataset[Any]) -> Sequence[Any] | None:
    """Returns the group of each sample, such as its speaker; None if the data set has no `groups`."""
    return getattr(dataset, "groups", None)


def targets_of(dataset: Dataset[Any]) -> np.ndarray[Any, Any]:
    """Returns the labels of all samples: the data set's `targets`, otherwise read one by one."""
    targets = getattr(dataset, "targets", None)
    if targets is None:
        targets = [dataset[i][1] for i in range(len(dataset))]  # type: ignore[arg-type]
    if isinstance(targets, Tensor):
        return targets.cpu().numpy()
    if any(isinstance(target, Tensor | dict) and getattr(target, "ndim", 1) for target in targets[:1]):
        whole = np.empty(len(targets), dtype=object)  # boxes, masks and the like are objects
        whole[:] = targets
        return whole
    return np.asarray(targets)


def labels_of(dataset: Dataset[Any]) -> np.ndarray[Any, Any] | None:
    """Returns the labels of all samples; None if there are none, and then `unlabelled` says what is missing."""
    return None if getattr(dataset, "unlabelled", "") else targets_of(dataset)


def check_labelled(dataset: Dataset[Any]) -> None:
    """Rejects a data set without labels.

    Raises:
        DataError: It has no labels.
    """
    if reason := getattr(dataset, "unlabelled", ""):
        raise DataError(reason)


def no_labels(where: str, missing: str) -> str:
    """Returns the message for a data set without labels."""
    uses = "`tl predict` can use it, and so can training, as a target beside a source"
    return f"{where} has no labels for lack of {missing}; {uses}"


def named_labels(dataset: Dataset[Any], class_names: Sequence[str] | None) -> list[Any]:
    """Returns the labels of all samples, classes by name; "" without labels."""
    if (labels := labels_of(dataset)) is None:
        return [""] * len(dataset)  # type: ignore[arg-type]
    return labels.tolist() if class_names is None else [class_names[label] for label in labels.tolist()]


def few_shots(
    dataset: Dataset[Any],
    shots: int | Literal["all"],
    class_names: Sequence[str] | None,
    seed: int,
    field: str = "shots_per_class",
) -> list[int]:
    """Returns the rows of `shots` samples of each class, drawn by `seed`, or all rows.

    Raises:
        DataError: A class has fewer; the labels are real values.
    """
    check_labelled(dataset)
    if shots == "all":
        return list(range(len(dataset)))  # type: ignore[arg-type]
    targets = targets_of(dataset)
    if class_names is None or targets.dtype.kind not in "iub":
        raise DataError(f"{field}: the labels are not classes; leave it out")
    by_class, nothing = rows_by_class(targets), np.zeros(0, np.int64)
    generator, rows = np.random.default_rng(seed), []
    for number, name in enumerate(class_names):
        own = by_class.get(number, nothing)
        if len(own) < shots:
            raise DataError(f"{field}: class {name} has {len(own)} training samples, fewer than {shots}")
        rows += generator.permutation(own)[:shots].tolist()
    return sorted(rows)


def rows_by_class(targets: np.ndarray[Any, Any]) -> dict[Any, np.ndarray[Any, Any]]:
    """Returns the rows of each label, ascending, by a single sort."""
    order = np.argsort(targets, kind="stable")
    classes, starts = np.unique(targets[order], return_index=True)
    return dict(zip(classes.tolist(), np.split(order, starts)[1:], strict=True))  # the first part is empty


def some_of_each(dataset: Dataset[Any], count: int, seed: int) -> list[int]:
    """Returns the rows of `count` samples in all, balanced over the classes as far as possible, drawn by `seed`."""
    check_labelled(dataset)
    targets = targets_of(dataset)
    order = np.random.default_rng(seed).permutation(len(targets))
    if targets.dtype.kind in "iub":
        turns = np.empty(len(order), np.int64)  # 0 for the first of each class, 1 for the second, ...
        for rows in rows_by_class(targets[order]).values():
            turns[rows] = np.arange(len(rows))
        order = order[np.argsort(turns, kind="stable")]
    return sorted(order[:count].tolist())


def augmented(dataset: Any, index: int, transform: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Returns a sample with `transform` applied to x; a data set with `augmented` applies it before resizing."""
    if hasattr(dataset, "augmented"):
        sample: tuple[Any, Any] = dataset.augmented(index, transform)
        return sample
    x, y = dataset[index]
    return transform(x), y


class Joined(ConcatDataset[Any]):
    """Concatenates data sets, with their `targets`, `ids` and `weights`."""

    def __init__(self, datasets: Sequence[Dataset[Any]]) -> None:
        super().__init__(datasets)
        self.targets = np.concatenate([targets_of(dataset) for dataset in datasets])
        self.ids = [name for dataset in datasets for name in ids_of(dataset)]
        self.unlabelled = next(filter(None, (getattr(dataset, "unlabelled", "") for dataset in datasets)), "")
        weights = [getattr(dataset, "weights", None) for dataset in datasets]
        if any(own is not None for own in weights):  # 1 for a data set without weights
            filled = (own or [1.0] * len(part) for own, part in zip(weights, datasets, strict=True))  # type: ignore[arg-type]
            self.weights = [weight for own in filled for weight in own]

    def fingerprint(self) -> str | None:
        """Returns a hash of the contents."""
        parts = [getattr(dataset, "fingerprint", lambda: None)() for dataset in self.datasets]
        return content_hash(*parts) if all(parts) else None


class Subset(Dataset[Any]):
    """Some rows of a data set, with its `targets`, `ids`, `groups`, `weights` and `lengths`."""

    def __init__(self, dataset: Any, rows: Sequence[int] | np.ndarray[Any, Any]) -> None:
        self.dataset, self.rows = dataset, rows
        self.targets = targets_of(dataset)[np.asarray(rows, np.int64)]
        self.groups, self.weights = map(self._own, ("groups", "weights"))
        self.unlabelled = getattr(dataset, "unlabelled", "")

    def _own(self, name: str) -> list[Any] | None:
        known = getattr(self.dataset, name, None)
        return None if known is None else [known[row] for row in self.rows]

    @property
    def ids(self) -> list[Any] | None:
        """Returns the id of each sample; computed on demand, since millions of ids take hundreds of megabytes."""
        return self._own("ids")

    @property
    def lengths(self) -> list[Any] | None:
        """Returns the length of each sample, in any unit; None if the data set has no `lengths`."""
        return self._own("lengths")

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str | None:
        """Returns a hash of the contents."""
        inner = getattr(self.dataset, "fingerprint", lambda: None)()
        return inner and content_hash(inner, np.asarray(self.rows))

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.rows[index]]

    def augmented(self, index: int, transform: Callable[[Any], Any]) -> tuple[Any, Any]:
        """Returns the sample, augmented by the data set."""
        return augmented(self.dataset, self.rows[index], transform)


def split_groups(groups: Sequence[Any], fractions: Sequence[float], seed: int) -> list[np.ndarray[Any, Any]]:
    """Returns disjoint rows for each fraction and, last, the rest; rows of one group stay together.

    Every part whose fraction is not zero gets at least one group.

    Raises:
        DataError: There are fewer groups than parts.
    """
    names, numbers = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    wanted = [fraction for fraction in fractions if fraction > 0]
    if len(names) <= len(wanted):
        raise DataError(f"group: {len(names)} groups ({', '.join(names)}) cannot be split into {len(wanted) + 1} parts")
    order = np.random.default_rng(seed).permutation(len(names)).tolist()
    sizes = np.bincount(numbers)
    parts: list[list[int]] = []
    for fraction in fractions:
        missing, part = fraction * len(numbers), list[int]()
        others = sum(later > 0 for later in fractions[len(parts) + 1 :]) + 1
        while fraction > 0 and len(order) > others and (not part or sizes[order[0]] / 2 <= missing):
            part.append(order.pop(0))
            missing -= sizes[part[-1]]
        parts.append(part)
    return [np.flatnonzero(np.isin(numbers, part)) for part in (*parts, order)]


def split_rows(
    targets: np.ndarray[Any, Any],
    fractions: Sequence[float],
    seed: int,
    stratified: bool = True,
    groups: Sequence[Any] | None = None,
) -> list[np.ndarray[Any, Any]]:
    """Returns disjoint rows for each fraction and, last, the rest; stratified by class if the labels are integers.

    With `stratified` false the labels are not read. With `groups`, one for each row, see `split_groups`.

    Every class with at least two samples gets at least one in each part whose fraction is not zero, as far as they
    last.
    """
    if groups is not None:
        return split_groups(groups, fractions, seed)
    generator = np.random.default_rng(seed)
    parts = [[np.zeros(0, np.int64)] for _ in range(len(fractions) + 1)]
    if targets.dtype.kind == "f" or not stratified:
        strata = [np.arange(len(targets))]
    else:
        strata = list(rows_by_class(targets).values())
    for stratum in strata:
        rows = generator.permutation(stratum)
        for part, fraction in zip(parts, fractions, strict=False):
            count = min(max(round(fraction * len(stratum)), int(fraction > 0)), len(rows) - 1)
            part.append(rows[:count])
            rows = rows[count:]
        parts[-1].append(rows)
    return [np.sort(np.concatenate(part)) for part in parts]


def complete_splits(
    found: Mapping[str, Dataset[Any]],
    where: str,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    stratified: bool = True,
) -> dict[str, Dataset[Any]]:
    """Completes the splits that were found to train, val and test.

    "unsplit" is cut by the seed, stratified unless the labels are hidden; a data set with `groups`, one for each
    sample, is cut between groups. A missing validation split is cut from the training split; without a test split the
    validation split is used, with a warning. With a `test_fraction` of 1 all samples are for testing.
    """
    splits = dict(found)
    if test_fraction == 1 and len(splits) == 1:
        return {"test": next(iter(splits.values()))}
    if "unsplit" in splits:
        pool = splits.pop("unsplit")
        val, test, train = split_rows(
            targets_of(pool), (val_fraction, test_fraction), seed, stratified, groups_of(pool)
        )
        log.info(
            "%s has no splits: of %d samples %d are for training, %d for validation and %d for testing; "
            "`tl test --data.test_fraction 1` takes all",
            where,
            len(targets_of(pool)),
            len(train),
            len(val),
            len(test),
        )
        return {"train": Subset(pool, train), "val": Subset(pool, val), "test": Subset(pool, test)}
    if "val" not in splits and "train" in splits:
        pool = splits["train"]
        val, train = split_rows(targets_of(pool), (val_fraction,), seed, stratified, groups_of(pool))
        splits |= {"train": Subset(pool, train), "val": Subset(pool, val)}
    if "test" not in splits and "val" in splits:
        splits["test"] = splits["val"]
        count, total = len(splits["test"]), sum(len(part) for part in found.values())  # type: ignore[arg-type,misc]
        log.warning(
            "%s has no test split: `tl test` uses its validation split, %d of %d samples, which also chooses the epoch",
            where,
            count,
            total,
        )
    return splits
