"""Loaders whose batches do not depend on the number of workers and processes, and that can resume within an epoch."""

from __future__ import annotations

import math
import os
import random
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from datamodules.errors import DataError
from datamodules.orders import Order, generator_of
from datamodules.splits import augmented, check_labelled, content_hash


class IndexedSubset(Dataset[Any]):
    """Some rows of a data set as (x, y, index) or (x, y, index, weight); y is None where labels are hidden.

    Indexed by (index, seed) it augments with that seed; indexed by an index alone it does not augment.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        rows: Sequence[int] | np.ndarray[Any, Any],
        transform: nn.Module | None = None,
        label: str = "y",
    ) -> None:
        self.dataset, self.transform, self.label = dataset, transform, label
        self.rows = rows if isinstance(rows, range) and rows == range(len(rows)) else np.asarray(rows)
        self.weights = getattr(dataset, "weights", None) if label == "y" else None
        if label == "y":
            check_labelled(dataset)

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str | None:
        """Returns a hash of the unaugmented contents, order and labels; None if the data set has no fingerprint."""
        inner = getattr(self.dataset, "fingerprint", lambda: None)()
        return inner and content_hash(inner, np.asarray(self.rows), self.label)

    def lengths(self) -> np.ndarray[Any, Any] | None:
        """Returns the length of each sample, in any unit; None if it is not known without reading the sample."""
        known = getattr(self.dataset, "lengths", None)
        return None if known is None else np.asarray(known)[np.asarray(self.rows)]

    def known_of(self, index: int) -> tuple[Any, ...]:
        """Returns what follows x and y of a sample, without reading it: its index, and its weight if it has one."""
        row = int(self.rows[index])
        return (row,) if self.weights is None else (row, self.weights[row])

    def known_of_all(self, indices: np.ndarray[Any, Any]) -> tuple[torch.Tensor, ...]:
        """Returns the same for several samples, a tensor (B,) each."""
        rows = indices.copy() if isinstance(self.rows, range) else self.rows[indices]
        weights = () if self.weights is None else (torch.tensor([self.weights[row] for row in rows.tolist()]),)
        return torch.from_numpy(rows), *weights

    def __getitem__(self, item: SampleIndex) -> tuple[Any, ...]:
        index, seed = item if isinstance(item, tuple) else (item, None)
        row = int(self.rows[index])
        if self.transform is None or seed is None:
            x, y = self.dataset[row]
        else:
            with seeded(seed):
                x, y = augmented(self.dataset, row, self.transform)
        return x, y if self.label == "y" else None, *self.known_of(index)


class Views(IndexedSubset):
    """Several views of each sample, x = (view, ...), each augmented independently.

    Indexed by (index, seed), the views follow from that seed. Indexed by an index alone, as in validation, x begins
    with the unaugmented sample, (plain, view, ...), and the views are the same each time.

    Args:
        dataset: Holds the samples.
        rows: Indices of the samples to use.
        transform: Augments a view.
        label: "y", or "none" where labels are hidden.
        count: Number of views.
    """

    def __init__(
        self, dataset: Dataset[Any], rows: Sequence[int], transform: nn.Module, label: str = "y", count: int = 2
    ) -> None:
        super().__init__(dataset, rows, transform, label)
        self.count = count

    def __getitem__(self, item: SampleIndex) -> tuple[Any, ...]:
        index, seed = item if isinstance(item, tuple) else (item, None)
        seeds = generator_of("views", index if seed is None else seed).integers(2**62, size=self.count).tolist()
        plain: list[SampleIndex] = [index] if seed is None else []
        found = [super(Views, self).__getitem__(each) for each in [*plain, *((index, each) for each in seeds)]]
        return tuple(x for x, *_ in found), *found[0][1:]


def views_of(
    dataset: Dataset[Any], rows: Sequence[int], transform: nn.Module | None, label: str, count: int
) -> IndexedSubset:
    """Returns rows of a data set with training augmentation, in `count` views.

    Raises:
        DataError: Several views would all be the same.
    """
    if count == 1:
        return IndexedSubset(dataset, rows, transform, label)
    if transform is None:
        raise DataError(
            "augment: pretraining compares views of a sample, and without augmentation they are all the same; leave it "
            "out, or pass views, strong, or transforms of your own"
        )
    return Views(dataset, rows, transform, label, count)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch, numpy and random inside the context, and restores their states on exit."""
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


SIGTERM_GRACE = 30  # seconds


def ignore_signals(worker: int) -> None:
    """Worker init: ignores signals to the whole process group or job, so that the main process can finish and save.

    SIGTERM is also how a process ends its workers, so it is obeyed, but only after a delay; `Loader.stop` is faster.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, SIGTERM_GRACE) and None)


SampleIndex = int | tuple[int, int]


class Loader(DataLoader[Any]):
    """A DataLoader that can resume within an epoch; Lightning saves and restores its state.

    Attributes:
        batch_source: Returns the batch of some indices without reading the data set, e.g. from a cache; None reads it.
        beside: Adds to a batch what is stored for its indices, e.g. a teacher's outputs.
        domain: The domain of its samples.
        purpose: In validation, what its samples are for: "val", or, without labels, "target val" or "target test".
    """

    domain: str = "target"
    purpose: str = "train"
    batch_source: Callable[[Sequence[SampleIndex]], Any] | None = None
    beside: Callable[[Any, Sequence[SampleIndex]], Any] | None = None
    dataset: IndexedSubset

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yields the epoch's batches; nothing is read before the first `next`, when the epoch is known."""
        self.batches_done = getattr(self.sampler, "start", 0) // (self.batch_size or 1)
        batches = super().__iter__() if self.batch_source is None else self._from_source(self.batch_source)
        if self.beside is not None:  # iterating the sampler twice gives the same
            batches = map(self.beside, batches, cast(Any, self.batch_sampler))
        for batch in batches:
            self.batches_done += 1
            yield batch

    def _from_source(self, source: Callable[[Sequence[SampleIndex]], Any]) -> Iterator[Any]:
        domain = cast(Named, self.collate_fn).domain
        for indices in cast(Any, self.batch_sampler):
            yield source(indices) if domain is None else {domain: source(indices)}

    def read(self, indices: Sequence[SampleIndex], batch_size: int = 1) -> DataLoader[Any]:
        """Reads these samples once, in order, with as many workers; batches do not name the domain."""
        return DataLoader(
            self.dataset,
            batch_size,
            sampler=cast(Any, indices),
            collate_fn=cast(Named, self.collate_fn).collate,
            num_workers=self.num_workers if len(indices) > batch_size else 0,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),
        )

    def plain(self, rows: Sequence[int]) -> Iterator[Any]:
        """Yields batches of these rows once, in order, without augmentation; from `batch_source`, if there is one."""
        size = self.batch_size or 1
        if self.batch_source is None:
            return iter(self.read(rows, size))
        return (self.batch_source(rows[start : start + size]) for start in range(0, len(rows), size))

    def first(self, count: int) -> list[Any]:
        """Reads raw (x, y) of the next epoch's first batch, augmented as they will be; at most `count`."""
        indices = list(self.sampler)[: min(count, self.batch_size or 1)]
        found = [self.dataset[index][:2] for index in indices]
        if isinstance(self.dataset, Views):  # side by side
            found = [(view, y) for views, y in found for view in views][:count]
        return found

    def stop(self) -> None:
        """Ends the worker processes, which would otherwise live until the interpreter waits for them."""
        iterator: Any = self._iterator
        self._iterator = None
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()

    def state_dict(self) -> dict[str, int]:
        """Returns the epoch and the number of batches given so far."""
        return {"epoch": getattr(self.sampler, "epoch", 0), "batches": getattr(self, "batches_done", 0)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Skips the batches already given in that epoch."""
        self.sampler.skip = (state["epoch"], state["batches"] * (self.batch_size or 1))  # type: ignore[attr-defined]


def collate(samples: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Stacks samples if no model defines how; a hidden label stays None."""
    xs, ys, *known = zip(*samples, strict=True)
    y = None if ys[0] is None else default_collate(list(ys))
    return default_collate(list(xs)), y, *map(torch.tensor, known)


class Named:
    """Makes a batch of samples and adds its domain's name.

    Args:
        collate: Makes the batch.
        domain: The name; None returns the batch without one.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Any], domain: str | None) -> None:
        self.collate, self.domain = collate, domain

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Returns {domain: batch}, or the batch."""
        batch = self.collate(samples)
        return batch if self.domain is None else {self.domain: batch}


def cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _world() -> tuple[int, int]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)


class EpochSampler(DistributedSampler[Any]):
    """Yields this process's part of an epoch: indices and seeds that depend on (seed, domain, epoch, position) only.

    The domain is included because two domains of equal size would otherwise have the same order: if files are sorted by
    class, a hidden target label would then be that of the source sample beside it.

    The orders of successive passes are concatenated and cut into global batches, and each process takes every world-th
    sample, so that the batches of two processes together equal those of one with twice the size. A last batch of a
    single sample, on which BatchNorm cannot train, is left out; each epoch leaves out another sample. If lengths are
    known, samples of similar length make a batch, to reduce padding; the order of batches is random, except that the
    longest comes first. It is a DistributedSampler so that Lightning keeps it and tells it the epoch.

    Args:
        dataset: The data set that is sampled.
        longest: Size of the longest domain, which sets the length of an epoch.
        batch_size: Samples per step of this process.
        seed: The run's seed.
        domain: The name of the domain.
        even: Makes all batches of an epoch a little smaller instead of leaving a tiny last one, whose BatchNorm
            statistics would be noise and whose samples would count more than others.

    Attributes:
        batch_size: The resulting batch size.
        skip: An epoch and the number of its samples to skip, because they were seen before the run was interrupted.
        views: Seeds of each sample's fixed views, (views - 1, samples): an epoch draws one of these or the plain
            sample. None: each epoch draws a new seed.
        chunk: Number of batches that are drawn together and sorted by length, if the data set has `lengths`.
    """

    views: Sequence[Sequence[int]] | None = None
    chunk = 50

    def __init__(
        self, dataset: IndexedSubset, longest: int, batch_size: int, seed: int, domain: str, even: bool = True
    ) -> None:
        rank, world = _world()
        super().__init__(dataset, num_replicas=world, rank=rank, shuffle=True, seed=seed)
        self.domain = domain
        self.num_samples = math.ceil(longest / world)
        self.total_size = self.num_samples * world
        self.batch_size = min(batch_size, self.num_samples)
        if even:
            self.batch_size = math.ceil(self.num_samples / math.ceil(self.num_samples / self.batch_size))
        if 1 < self.batch_size < self.num_samples and self.num_samples % self.batch_size == 1:
            self.num_samples -= 1
        self.skip = (-1, 0)
        self._key: Any = None  # identifies the pass in `_order`

    @property
    def start(self) -> int:
        """Returns how many samples of this epoch are skipped."""
        return self.skip[1] if self.skip[0] == self.epoch else 0

    def __iter__(self) -> Iterator[Any]:
        world, whole = self.num_replicas, None
        if (lengths := self.dataset.lengths()) is not None:  # type: ignore[attr-defined]
            whole = self._drawn(0, self.num_samples * world)
            self._bucket(whole, lengths)
        for start in range(self.start, self.num_samples, 4096):
            first, last = start * world, min(start + 4096, self.num_samples) * world
            drawn = self._drawn(first, last) if whole is None else whole[first:last]
            for index, seed in drawn[self.rank :: world].tolist():
                yield self._view(index, seed)

    def _drawn(self, first: int, last: int) -> np.ndarray[Any, Any]:
        """Returns indices and seeds of the samples from `first` to `last` of all processes, over successive passes."""
        size, parts = len(self.dataset), []  # type: ignore[arg-type]
        for number in range(first // size, math.ceil(last / size)):
            key = (size, self.seed, self.domain, self.epoch, number)
            if key != self._key:
                self._key, self._order = key, Order(*key)
            start = number * size
            parts.append(self._order[max(first - start, 0) : min(last - start, size)])
        return np.concatenate(parts)

    def _bucket(self, order: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> None:
        """Groups samples (index, seed) of similar length into batches, in chunks that lie within one pass each."""
        batch, size = self.batch_size * self.num_replicas, len(lengths)
        generator = generator_of(self.seed, self.domain, self.epoch, "batches")
        for start in range(0, len(order), size):
            first, end = math.ceil(start / batch), min(start + size, len(order)) // batch
            for position in range(first, end, self.chunk):
                part = order[position * batch : min(position + self.chunk, end) * batch]
                batches = np.argsort(lengths[part[:, 0]], kind="stable").reshape(-1, batch)
                part[:] = part[generator.permutation(np.sort(batches, 1)).ravel()]  # within a batch in the order drawn
        whole = order[: min(size, len(order)) // batch * batch].reshape(-1, batch, 2)
        if len(whole):  # the longest comes first, to run out of memory at once if at all
            worst = lengths[whole[:, :, 0]].max(1).argmax()
            whole[[0, worst]] = whole[[worst, 0]]

    def _view(self, index: int, seed: int) -> SampleIndex:
        if self.views is None:
            return index, seed
        view = seed % (len(self.views) + 1)
        return (index, self.views[view - 1][index]) if view else index


class EvalSampler(DistributedSampler[Any]):
    """Yields this process's part of the samples in order, without repetition (torch's sampler pads with repetitions).

    It is a DistributedSampler so that Lightning keeps it.
    """

    def __init__(self, dataset: IndexedSubset) -> None:
        rank, world = _world()
        super().__init__(dataset, num_replicas=world, rank=rank, shuffle=False)
        self.rows = range(rank, len(dataset), world)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def even_batch_size(samples: int, world: int, batch_size: int) -> int:
    """Returns the batch size near `batch_size` with which all processes run the same number of batches, so none waits.

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
