"""What every datamodule is: domains with splits, and the one convention that data and models share, the batch.

    training    {"source": (x, y), "target": (x, y)}      y is None where labels are hidden; several sources are
                                                          "source/photo", "source/sketch", ...
    evaluation  {"target": (x, y)}                        one domain
    prediction  {"target": (x, row number)}

Datamodules know nothing of models, nor the other way round.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import random
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, default_collate

log = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}


class DataError(Exception):
    """A mistake in the data or its settings; its text names the file, field or value and what to do."""


class TransferDataModule(LightningDataModule):
    """Loads source domains and/or a target; a subclass writes `domains` and sets `num_outputs` and `class_names`.

    A target alone is labelled (fine-tuning). **Beside a source the target's labels reach neither training nor model
    selection**, unless `target_labels` opens them; validation then runs on the source's labelled samples, and gives
    what the model says of the target's validation and test samples without their labels.

    A data set is map-style and gives (x, y). For few shots and stratified splits it has `targets`, the labels of all
    samples; for predictions it may have `ids`, a name per sample; with `fingerprint()`, a text that changes whenever a
    sample or label does, cached features of it serve later runs too.

    Args:
        batch_size: Samples per domain in a step.
        num_workers: Processes that load data; 0 loads in the main one; None is one per core, at most 8.
        shots_per_class: Keeps that many labelled target training samples of each class.
        target_labels: Whether training and model selection see the target's labels; None shows those of a target alone
            (fine-tuning) and hides them beside a source (adaptation). False hides them also of a target alone
            (source-free adaptation).
        target_unseen: Keeps the target out of training altogether (domain generalisation).
        selection_labels: So many labels of each class of the target's validation split, or "all", are open to the
            choice of the model, `--select.by few` or `oracle`; to nothing else.
        augment: Transforms of a training x, in this order, e.g. torchvision.transforms.v2.RandomHorizontalFlip.
        drop_last: Drops the last training batch where it is smaller than the others.
        seed: Seeds splits, shots and shuffling.

    Attributes:
        num_outputs: Width of the head that the labels need.
        class_names: Names of the classes, in the order of their numbers; None for real-valued labels.
    """

    num_outputs: int
    class_names: list[str] | None = None

    def __init__(
        self,
        batch_size: int = 32,
        num_workers: int | None = 0,
        shots_per_class: int | None = None,
        target_labels: bool | None = None,
        target_unseen: bool = False,
        selection_labels: int | Literal["all"] | None = None,
        augment: list[nn.Module] | None = None,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise DataError(f"batch_size: {batch_size} must be at least 1")
        if shots_per_class is not None and shots_per_class < 1:
            raise DataError(f"shots_per_class: {shots_per_class} must be at least 1")
        self.batch_size = batch_size
        self.num_workers = min(8, _cores()) if num_workers is None else num_workers
        self.shots_per_class = shots_per_class
        if isinstance(selection_labels, int) and selection_labels < 1:
            raise DataError(f"selection_labels: {selection_labels} must be at least 1, or all")
        if target_labels and target_unseen:
            raise DataError("target_labels, target_unseen: a target that training does not see has no labels for it")
        self.target_labels = target_labels
        self.target_unseen = target_unseen
        self.selection_labels = selection_labels
        self.augment = nn.Sequential(*augment) if augment else None
        self.drop_last = drop_last
        self.seed = seed
        self._domains: dict[str, Mapping[str, Dataset[Any]]] = {}
        self._loaders: list[Loader] = []

    def domains(self, split: str) -> Mapping[str, Dataset[Any]]:
        """The data set of each domain that this split has.

        Args:
            split: "train", "val" or "test".

        Returns:
            Keys are "target" and "source", or, for several sources, "source/<name>" each.
        """
        raise NotImplementedError

    def _of(self, split: str) -> Mapping[str, Dataset[Any]]:
        if split not in self._domains:
            self._domains[split] = self.domains(split)
        return self._domains[split]

    def hidden(self, split: str = "train") -> bool:
        """Whether the target's labels are kept from training and model selection."""
        return self.hides(self._of(split))

    def hides(self, domains: Collection[str]) -> bool:
        """The same for the domains of these names."""
        beside = len(domains) > 1 if self.target_labels is None else not self.target_labels
        return "target" in domains and (beside or self.target_unseen)

    def has_source(self) -> bool:
        """Whether there is a source to validate on."""
        return any(name != "target" for name in self._of("val"))

    def _one(self, split: str) -> tuple[str, Dataset[Any]]:
        """The domain that an evaluation runs on: the target, but for model selection only where its labels are open."""
        domains = dict(self._of(split))
        target = domains.pop("target", None)
        if target is not None and (not domains or split == "test" or not self.hidden(split)):
            return "target", target
        sources = list(domains.values())
        return "source", sources[0] if len(sources) == 1 else Joined(sources)

    def train_dataloader(self) -> CombinedLoader:
        """All domains side by side; an epoch is the longest one's, and a shorter one starts over, in a new order."""
        domains = {name: d for name, d in self._of("train").items() if name != "target" or not self.target_unseen}
        hidden = self.hidden()
        if not domains:
            raise DataError("target_unseen: there is no source to train on; give --data.source")
        if hidden and self.shots_per_class:
            raise DataError(
                "shots_per_class: it picks target samples by their labels, which are hidden beside a source; "
                "pass --data.target_labels true"
            )
        views, loaders = {}, {}
        for name, dataset in domains.items():
            rows: Sequence[int] = range(len(dataset))  # type: ignore[arg-type]
            if name == "target" and self.shots_per_class:
                rows = few_shots(dataset, self.shots_per_class, self.class_names, self.seed)
            views[name] = View(dataset, rows, self.augment, label="none" if hidden and name == "target" else "y")
        longest = max(map(len, views.values()))
        for name, view in views.items():
            sampler = Shuffled(view, longest, self.batch_size, self.seed)
            loaders[name] = self._loader(view, sampler.batch_size, sampler, drop_last=self.drop_last)
        return CombinedLoader(loaders, "min_size")  # all are of one length

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The labelled validation split; where the target's labels are hidden, also its samples without them."""
        name, dataset = self._one("val")
        hidden = self.hidden("val")
        loaders: list[DataLoader[Any]] = []
        if not (hidden and name == "target"):
            loaders.append(self._rows(dataset, name, "y", "val"))
        if hidden:
            seen: list[Dataset[Any]] = []
            for split in ("val", "test"):
                target = self._of(split)["target"]
                if not any(target is other for other in seen):
                    loaders.append(self._rows(target, "target", "none", f"target {split}"))
                    seen.append(target)
        return loaders[0] if len(loaders) == 1 else loaders

    def opened(self) -> tuple[list[int], np.ndarray[Any, Any]]:
        """The rows of the target's validation split whose labels `selection_labels` opens, and these labels."""
        dataset = self._of("val")["target"]
        if self.selection_labels is None:
            return [], np.zeros(0)
        rows = list(range(len(dataset)))  # type: ignore[arg-type]
        if self.selection_labels != "all":
            rows = few_shots(dataset, self.selection_labels, self.class_names, self.seed, "selection_labels")
        return rows, targets_of(dataset)[rows]

    def labels(self, split: str) -> np.ndarray[Any, Any]:
        """The target's labels, for the report after `tl test`."""
        return targets_of(self._of(split)["target"])

    def test_dataloader(self) -> DataLoader[Any]:
        """The target's test split (the source's, where there is no target)."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """What `test_dataloader` loads, with row numbers instead of labels; see `ids`."""
        return self._evaluation("test", label="row")

    def ids(self) -> list[str]:
        """The name of each row of `predict_dataloader`."""
        _, dataset = self._one("test")
        return _ids(dataset)

    def every_split(self) -> dict[tuple[str, str], DataLoader[Any]]:
        """A loader of row numbers for each (domain, split), without augmentation; a split that is another one, once."""
        found: dict[tuple[str, str], DataLoader[Any]] = {}
        seen: list[Dataset[Any]] = []
        for split in SPLITS:
            for domain, dataset in self._of(split).items():
                if not any(dataset is other for other in seen):
                    seen.append(dataset)
                    found[domain, split] = self._rows(dataset, domain, "row", split)
        return found

    def described(self, domain: str, split: str) -> tuple[Sequence[str], Sequence[Any]]:
        """The names and the labels of a split's rows; a class by its name."""
        dataset = self._of(split)[domain]
        labels = targets_of(dataset).tolist()
        names = self.class_names
        return _ids(dataset), labels if names is None else [names[label] for label in labels]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """On a CPU the batch is there."""
        return batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _evaluation(self, split: str, label: str = "y") -> DataLoader[Any]:
        name, dataset = self._one(split)
        return self._rows(dataset, name, label, split)

    def _rows(self, dataset: Dataset[Any], domain: str, label: str, role: str) -> DataLoader[Any]:
        view = View(dataset, range(len(dataset)), label=label)  # type: ignore[arg-type]
        sampler = Shard(view)
        size = even_batch_size(len(view), sampler.num_replicas, self.batch_size)
        loader = self._loader(view, size, sampler, domain=domain)
        loader.role = role
        return loader

    def _loader(
        self, view: View, size: int, sampler: Any, domain: str | None = None, drop_last: bool = False
    ) -> Loader:
        loader = Loader(
            view,
            batch_size=size,
            sampler=sampler,
            collate_fn=partial(collate, domain=domain),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            drop_last=drop_last,
            worker_init_fn=_deaf,
            generator=torch.Generator(),  # of its own, so that making an iterator leaves the model's numbers alone
        )
        self._loaders.append(loader)
        return loader

    def teardown(self, stage: str) -> None:
        """Ends the loaders' workers."""
        while self._loaders:
            self._loaders.pop().stop()

    def on_exception(self, exception: BaseException) -> None:
        """Ends them too where a run ends early."""
        self.teardown("")


class View(Dataset[Any]):
    """Some rows of a data set, augmented, with labels, without, or with row numbers in their place."""

    def __init__(
        self, dataset: Dataset[Any], rows: Sequence[int], transform: nn.Module | None = None, label: str = "y"
    ) -> None:
        self.dataset, self.rows, self.transform, self.label = dataset, rows, transform, label

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str | None:
        """What names its contents, their order and labels; None if the data set cannot say."""
        inner = getattr(self.dataset, "fingerprint", lambda: None)()
        return inner and digest(inner, np.asarray(self.rows), self.label, repr(self.transform))

    def __getitem__(self, place: Place) -> tuple[Any, Any]:
        index, seed = place if isinstance(place, tuple) else (place, 0)
        x, y = self.dataset[self.rows[index]]
        if self.transform is not None:
            with seeded(seed):
                x = self.transform(x)
        return x, {"y": y, "none": None, "row": index}[self.label]


def digest(*parts: Any) -> str:
    """SHA-256 of texts, numbers and arrays, which names what a data set holds."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray | Tensor):
            array = np.ascontiguousarray(part)
            total.update(f"{array.shape} {array.dtype} ".encode())
            total.update(array.data if array.size and array.dtype.kind != "O" else repr(array.tolist()).encode())
        else:
            total.update(f"{part!r} ".encode())
    return total.hexdigest()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch, numpy and random follow from `seed` inside, and go on outside as if nothing were."""
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])


GRACE = 30  # seconds


def _deaf(worker: int) -> None:
    """Keeps a worker alive through a signal to the whole process group or job: the main process still needs it to save.

    SIGTERM is also how a process ends its workers, so it is obeyed, but only after a while; `Loader.stop` is faster.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, GRACE) and None)


Place = int | tuple[int, int]


class Loader(DataLoader[Any]):
    """A DataLoader that can say how far it is in an epoch and go on from there; Lightning saves and restores this.

    Attributes:
        memory: Gives a batch for its places where the data set is not to be read, e.g. cached features; None reads.
        role: In validation, what its samples are for: "val", or without labels "target val" and "target test".
    """

    role: str = "train"

    memory: Callable[[Sequence[Place]], tuple[Any, Any]] | None = None
    dataset: View

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The epoch's batches; an iterator reads nothing before its first `next`, when the epoch is known."""
        self.done = getattr(self.sampler, "start", 0) // (self.batch_size or 1)
        for batch in super().__iter__() if self.memory is None else self._remembered(self.memory):
            self.done += 1
            yield batch

    def _remembered(self, memory: Callable[[Sequence[Place]], tuple[Any, Any]]) -> Iterator[Any]:
        domain = cast(Any, self.collate_fn).keywords["domain"]
        for places in cast(Any, self.batch_sampler):
            yield memory(places) if domain is None else {domain: memory(places)}

    def read(self, places: Sequence[Place], batch_size: int = 1) -> DataLoader[Any]:
        """Reads these places in their order once, with as many workers; batches are (x, y) whatever the domain."""
        return DataLoader(
            self.dataset,
            batch_size,
            sampler=cast(Any, places),
            collate_fn=collate,
            num_workers=self.num_workers if len(places) > batch_size else 0,
            worker_init_fn=_deaf,
            generator=torch.Generator(),
        )

    def stop(self) -> None:
        """Ends its worker processes, which would otherwise live until the interpreter waits for them."""
        iterator: Any = self._iterator
        self._iterator = None
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()

    def state_dict(self) -> dict[str, int]:
        """The epoch and the batches that it has given."""
        return {"epoch": getattr(self.sampler, "epoch", 0), "batches": getattr(self, "done", 0)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Leaves those batches out of that epoch."""
        self.sampler.done = (state["epoch"], state["batches"] * (self.batch_size or 1))  # type: ignore[attr-defined]


def collate(samples: Sequence[tuple[Any, Any]], domain: str | None = None) -> Any:
    """Stacks samples; a hidden label stays None. With `domain`, the batch names it."""
    xs, ys = zip(*samples, strict=True)
    batch = (default_collate(list(xs)), None if ys[0] is None else default_collate(list(ys)))
    return batch if domain is None else {domain: batch}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _world() -> tuple[int, int]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)


class Shuffled(DistributedSampler[Any]):
    """This process's part of an epoch: places and seeds that follow from (seed, epoch, place) alone.

    The order of one pass after the other is cut into global batches, and each process takes every world-th sample, so
    that the batches of two processes together are those of one with twice the size. It is a DistributedSampler so that
    Lightning keeps it and tells it the epoch.

    Args:
        dataset: What is sampled.
        longest: Samples of the longest domain, which sets the length of an epoch.
        batch_size: Samples in a step of this process.
        seed: The run's seed.

    Attributes:
        batch_size: The same, or less where the longest domain has less.
        done: An epoch and the samples to leave out of it, since they were seen before the run was interrupted.
    """

    def __init__(self, dataset: View, longest: int, batch_size: int, seed: int) -> None:
        rank, world = _world()
        super().__init__(dataset, num_replicas=world, rank=rank, shuffle=True, seed=seed)
        self.num_samples = math.ceil(longest / world)
        self.total_size = self.num_samples * world
        self.batch_size = min(batch_size, self.num_samples)
        self.done = (-1, 0)

    @property
    def start(self) -> int:
        """How many samples of this epoch are left out."""
        return self.done[1] if self.done[0] == self.epoch else 0

    def __iter__(self) -> Iterator[Any]:
        size, parts = len(self.dataset), []  # type: ignore[arg-type]
        for number in range(math.ceil(self.total_size / size)):
            generator = np.random.default_rng((self.seed, self.epoch, number))
            order, seeds = generator.permutation(size), generator.integers(2**62, size=size)
            parts.append(np.stack([order, seeds[order]], 1))
        mine = np.concatenate(parts)[: self.total_size][self.rank :: self.num_replicas]
        return iter([(place, seed) for place, seed in mine[self.start :].tolist()])


class Shard(DistributedSampler[Any]):
    """This process's part of the samples in their order, none of them twice (torch's own pads with repetitions).

    It is a DistributedSampler so that Lightning keeps it.
    """

    def __init__(self, dataset: View) -> None:
        rank, world = _world()
        super().__init__(dataset, num_replicas=world, rank=rank, shuffle=False)
        self.rows = range(rank, len(dataset), world)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def even_batch_size(samples: int, world: int, batch_size: int) -> int:
    """The batch size near `batch_size` with which every process runs the same number of batches, so that none waits.

    Raises:
        DataError: There are fewer samples than processes.
    """
    low, high = samples // world, math.ceil(samples / world)
    if low == 0:
        raise DataError(f"{samples} samples cannot be shared by {world} processes; use fewer --trainer.devices")
    for batches in range(math.ceil(low / batch_size), 0, -1):
        size = math.ceil(high / batches)
        if math.ceil(low / size) == math.ceil(high / size):
            return size
    return high


def _ids(dataset: Dataset[Any]) -> list[str]:
    return list(getattr(dataset, "ids", None) or map(str, range(len(dataset))))  # type: ignore[arg-type]


def targets_of(dataset: Dataset[Any]) -> np.ndarray[Any, Any]:
    """The labels of all samples: the data set's `targets`, or, where it has none, read one by one."""
    targets = getattr(dataset, "targets", None)
    if targets is None:
        targets = [dataset[i][1] for i in range(len(dataset))]  # type: ignore[arg-type]
    return np.asarray(targets.cpu() if isinstance(targets, Tensor) else targets)


def few_shots(
    dataset: Dataset[Any],
    shots: int,
    class_names: Sequence[str] | None,
    seed: int,
    field: str = "shots_per_class",
) -> list[int]:
    """Rows of `shots` samples of each class, drawn by `seed`.

    Raises:
        DataError: A class has fewer; the labels are real values.
    """
    targets = targets_of(dataset)
    if class_names is None or targets.dtype.kind == "f":
        raise DataError(f"{field}: the labels are no classes; leave it out")
    generator, rows = np.random.default_rng(seed), []
    for number, name in enumerate(class_names):
        own = np.flatnonzero(targets == number)
        if len(own) < shots:
            raise DataError(f"{field}: class {name} has {len(own)} training samples, fewer than {shots}")
        rows += generator.permutation(own)[:shots].tolist()
    return sorted(rows)


class Joined(ConcatDataset[Any]):
    """Several data sets one after the other, with their `targets` and `ids`."""

    def __init__(self, datasets: Sequence[Dataset[Any]]) -> None:
        super().__init__(datasets)
        self.targets = np.concatenate([targets_of(dataset) for dataset in datasets])
        self.ids = [name for dataset in datasets for name in _ids(dataset)]

    def fingerprint(self) -> str | None:
        """What names its contents."""
        parts = [getattr(dataset, "fingerprint", lambda: None)() for dataset in self.datasets]
        return digest(*parts) if all(parts) else None


class Rows(Dataset[Any]):
    """Some rows of a data set, with its `targets` and `ids`."""

    def __init__(self, dataset: Any, rows: Sequence[int]) -> None:
        self.dataset, self.rows = dataset, rows
        self.targets = targets_of(dataset)[list(rows)]
        ids = getattr(dataset, "ids", None)
        self.ids = [ids[row] for row in rows] if ids is not None else None

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str | None:
        """What names its contents."""
        inner = getattr(self.dataset, "fingerprint", lambda: None)()
        return inner and digest(inner, np.asarray(self.rows))

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.rows[index]]


def split_rows(
    targets: np.ndarray[Any, Any], fractions: Sequence[float], seed: int, stratified: bool = True
) -> list[list[int]]:
    """Disjoint rows for each fraction and, last, the rest; stratified by class where the labels are integers.

    Without `stratified` the labels are not looked at.

    Every class with at least two samples gets one or more in each part whose fraction is not zero, as far as they go.
    """
    generator = np.random.default_rng(seed)
    parts: list[list[int]] = [[] for _ in range(len(fractions) + 1)]
    real = targets.dtype.kind == "f" or not stratified
    strata = [np.arange(len(targets))] if real else [np.flatnonzero(targets == c) for c in np.unique(targets)]
    for stratum in strata:
        rows = generator.permutation(stratum).tolist()
        for part, fraction in zip(parts, fractions, strict=False):
            count = min(max(round(fraction * len(stratum)), int(fraction > 0)), len(rows) - 1)
            part += rows[:count]
            rows = rows[count:]
        parts[-1] += rows
    return [sorted(part) for part in parts]


def three_way(
    found: Mapping[str, Dataset[Any]],
    where: str,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    stratified: bool = True,
) -> dict[str, Dataset[Any]]:
    """Completes what was found to train, val and test.

    With "all" alone, seeded parts are cut from it, stratified unless the labels are hidden. A missing validation split
    is cut from the training split; a missing test split is the validation split, said once.
    """
    splits = dict(found)
    if "all" in splits:
        pool = splits.pop("all")
        val, test, train = split_rows(targets_of(pool), (val_fraction, test_fraction), seed, stratified)
        return {"train": Rows(pool, train), "val": Rows(pool, val), "test": Rows(pool, test)}
    if "val" not in splits and "train" in splits:
        pool = splits["train"]
        val, train = split_rows(targets_of(pool), (val_fraction,), seed, stratified)
        splits |= {"train": Rows(pool, train), "val": Rows(pool, val)}
    if "test" not in splits and "val" in splits:
        log.warning("%s has no test split: `tl test` uses its validation split", where)
        splits["test"] = splits["val"]
    return splits


def expand(path: str | os.PathLike[str] | None, field: str) -> Path | None:
    """A path with ~ and $VARIABLES filled in.

    Raises:
        DataError: A variable is not set, or nothing is there.
    """
    if path is None:
        return None
    full = Path(os.path.expandvars(path)).expanduser()
    if "$" in str(full):
        raise DataError(f"{field}: {path} uses a variable that is not set; export it, or pass --data.{field} PATH")
    if not full.exists():
        raise DataError(f"{field}: there is no file or folder {full}")
    return full
