"""Loaders that give the same batches whatever the number of workers and processes, and can go on where they were."""

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
    """Some rows of a data set as (x, y, number in it), or (x, y, number, weight); y is None where labels are hidden.

    Indexed by (index, seed) it augments with that seed, by an index alone it does not.
    """

    def __init__(
        self, dataset: Dataset[Any], rows: Sequence[int], transform: nn.Module | None = None, label: str = "y"
    ) -> None:
        self.dataset, self.rows, self.transform, self.label = dataset, rows, transform, label
        self.weights = getattr(dataset, "weights", None) if label == "y" else None
        if label == "y":
            check_labelled(dataset)

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str | None:
        """What names its contents before augmentation, their order and labels; None if the data set cannot say."""
        inner = getattr(self.dataset, "fingerprint", lambda: None)()
        return inner and content_hash(inner, np.asarray(self.rows), self.label)

    def lengths(self) -> np.ndarray[Any, Any] | None:
        """How long each sample is, in any unit; None where that is not known without reading it."""
        known = getattr(self.dataset, "lengths", None)
        return None if known is None else np.asarray(known)[np.asarray(self.rows)]

    def known_of(self, index: int) -> tuple[Any, ...]:
        """What follows x and y of a sample, without reading it: its number, and its weight where there are any."""
        row = self.rows[index]
        return (row,) if self.weights is None else (row, self.weights[row])

    def __getitem__(self, place: SampleIndex) -> tuple[Any, ...]:
        index, seed = place if isinstance(place, tuple) else (place, None)
        row = self.rows[index]
        if self.transform is None or seed is None:
            x, y = self.dataset[row]
        else:
            with seeded(seed):
                x, y = augmented(self.dataset, row, self.transform)
        return x, y if self.label == "y" else None, *self.known_of(index)


class Views(IndexedSubset):
    """Several views of each sample, x = (view, ...), each augmented by itself.

    Indexed by (index, seed), the views follow from that seed. Indexed by a number alone, as in validation, x begins
    with the sample as it is, (plain, view, ...), and its views are the same each time.

    Args:
        dataset: What has the samples.
        rows: Which of them.
        transform: What augments a view.
        label: "y", or "none" where labels are hidden.
        count: How many views.
    """

    def __init__(
        self, dataset: Dataset[Any], rows: Sequence[int], transform: nn.Module, label: str = "y", count: int = 2
    ) -> None:
        super().__init__(dataset, rows, transform, label)
        self.count = count

    def __getitem__(self, place: SampleIndex) -> tuple[Any, ...]:
        index, seed = place if isinstance(place, tuple) else (place, None)
        seeds = generator_of("views", index if seed is None else seed).integers(2**62, size=self.count).tolist()
        plain: list[SampleIndex] = [index] if seed is None else []
        found = [super(Views, self).__getitem__(each) for each in [*plain, *((index, each) for each in seeds)]]
        return tuple(x for x, *_ in found), *found[0][1:]


def views_of(
    dataset: Dataset[Any], rows: Sequence[int], transform: nn.Module | None, label: str, count: int
) -> IndexedSubset:
    """Rows of a data set as training sees them: augmented, in so many views.

    Raises:
        DataError: Several views would all be the same.
    """
    if count == 1:
        return IndexedSubset(dataset, rows, transform, label)
    if transform is None:
        raise DataError(
            "augment: views of a sample are compared, and without augmentation they are all the same; leave it out, or "
            "pass views, strong, or transforms of your own"
        )
    return Views(dataset, rows, transform, label, count)


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


SIGTERM_GRACE = 30  # seconds


def ignore_signals(worker: int) -> None:
    """Keeps a worker alive through a signal to the whole process group or job: the main process still needs it to save.

    SIGTERM is also how a process ends its workers, so it is obeyed, but only after a while; `Loader.stop` is faster.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, SIGTERM_GRACE) and None)


SampleIndex = int | tuple[int, int]


class Loader(DataLoader[Any]):
    """A DataLoader that can say how far it is in an epoch and go on from there; Lightning saves and restores this.

    Attributes:
        batch_source: Gives the batch of some indices without reading the data set, e.g. cached features; None reads.
        beside: Adds to a batch what is known of its indices, e.g. what a teacher has said of them.
        domain: Whose samples it gives.
        purpose: In validation, what its samples are for: "val", or without labels "target val" and "target test".
    """

    domain: str = "target"
    purpose: str = "train"
    batch_source: Callable[[Sequence[SampleIndex]], Any] | None = None
    beside: Callable[[Any, Sequence[SampleIndex]], Any] | None = None
    dataset: IndexedSubset

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The epoch's batches; an iterator reads nothing before its first `next`, when the epoch is known."""
        self.batches_done = getattr(self.sampler, "start", 0) // (self.batch_size or 1)
        batches = super().__iter__() if self.batch_source is None else self._from_source(self.batch_source)
        if self.beside is not None:  # the sampler says the same twice
            batches = map(self.beside, batches, cast(Any, self.batch_sampler))
        for batch in batches:
            self.batches_done += 1
            yield batch

    def _from_source(self, source: Callable[[Sequence[SampleIndex]], Any]) -> Iterator[Any]:
        domain = cast(Named, self.collate_fn).domain
        for places in cast(Any, self.batch_sampler):
            yield source(places) if domain is None else {domain: source(places)}

    def read(self, places: Sequence[SampleIndex], batch_size: int = 1) -> DataLoader[Any]:
        """Reads these places in their order once, with as many workers; batches do not name the domain."""
        return DataLoader(
            self.dataset,
            batch_size,
            sampler=cast(Any, places),
            collate_fn=cast(Named, self.collate_fn).collate,
            num_workers=self.num_workers if len(places) > batch_size else 0,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),
        )

    def plain(self, rows: Sequence[int]) -> Iterator[Any]:
        """Batches of these rows once, in their order, without augmentation; from `batch_source`, if there is one."""
        size = self.batch_size or 1
        if self.batch_source is None:
            return iter(self.read(rows, size))
        return (self.batch_source(rows[start : start + size]) for start in range(0, len(rows), size))

    def first(self, count: int) -> list[Any]:
        """Reads the raw (x, y) of the next epoch's first batch, augmented as that will be; at most so many."""
        places = list(self.sampler)[: min(count, self.batch_size or 1)]
        found = [self.dataset[place][:2] for place in places]
        if isinstance(self.dataset, Views):  # side by side
            found = [(view, y) for views, y in found for view in views][:count]
        return found

    def stop(self) -> None:
        """Ends its worker processes, which would otherwise live until the interpreter waits for them."""
        iterator: Any = self._iterator
        self._iterator = None
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()

    def state_dict(self) -> dict[str, int]:
        """The epoch and the batches that it has given."""
        return {"epoch": getattr(self.sampler, "epoch", 0), "batches": getattr(self, "batches_done", 0)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Leaves those batches out of that epoch."""
        self.sampler.skip = (state["epoch"], state["batches"] * (self.batch_size or 1))  # type: ignore[attr-defined]


def collate(samples: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Stacks samples where no model says how; a hidden label stays None."""
    xs, ys, *known = zip(*samples, strict=True)
    y = None if ys[0] is None else default_collate(list(ys))
    return default_collate(list(xs)), y, *map(torch.tensor, known)


class Named:
    """Makes a batch of samples and names its domain.

    Args:
        collate: What makes the batch.
        domain: None leaves the naming to somebody else.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Any], domain: str | None) -> None:
        self.collate, self.domain = collate, domain

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Returns {domain: batch}, or the batch."""
        batch = self.collate(samples)
        return batch if self.domain is None else {self.domain: batch}


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _world() -> tuple[int, int]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)


class EpochSampler(DistributedSampler[Any]):
    """This process's part of an epoch: places and seeds that follow from (seed, domain, epoch, place) alone.

    The domain counts because two of equal size would otherwise be in the same order: where files are sorted by class, a
    hidden target label would then be that of the source sample beside it.

    The order of one pass after the other is cut into global batches, and each process takes every world-th sample, so
    that the batches of two processes together are those of one with twice the size. A last batch of a single sample, on
    which BatchNorm could not train, is left out; in each epoch that is another sample. Where lengths are known, samples
    of like length make a batch, so that little is padded; which batch comes when is drawn, but for the longest. It is a
    DistributedSampler so that Lightning keeps it and tells it the epoch.

    Args:
        dataset: What is sampled.
        longest: Samples of the longest domain, which sets the length of an epoch.
        batch_size: Samples in a step of this process.
        seed: The run's seed.
        domain: The name of the domain.
        even: Makes the batches of an epoch smaller rather than the last one tiny, whose statistics would be noise to
            BatchNorm and whose samples would count more than others.

    Attributes:
        batch_size: What it comes to.
        skip: An epoch and the samples to leave out of it, since they were seen before the run was interrupted.
        views: Seeds of each sample's fixed views, (views - 1, samples): an epoch draws one of these or the sample as
            it is. None: each epoch draws a new seed.
        chunk: How many batches are drawn together and sorted by length, where the data set has `lengths`.
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
        self._key: Any = None  # of the pass that `_order` has

    @property
    def start(self) -> int:
        """How many samples of this epoch are left out."""
        return self.skip[1] if self.skip[0] == self.epoch else 0

    def __iter__(self) -> Iterator[Any]:
        world, whole = self.num_replicas, None
        if (lengths := self.dataset.lengths()) is not None:  # type: ignore[attr-defined]
            whole = self._drawn_places(0, self.num_samples * world)
            self._bucket(whole, lengths)
        for start in range(self.start, self.num_samples, 4096):
            first, last = start * world, min(start + 4096, self.num_samples) * world
            drawn = self._drawn_places(first, last) if whole is None else whole[first:last]
            for place, seed in drawn[self.rank :: world].tolist():
                yield self._view(place, seed)

    def _drawn_places(self, first: int, last: int) -> np.ndarray[Any, Any]:
        """Places and seeds of the samples from `first` to `last` of all processes, of one pass after the other."""
        size, parts = len(self.dataset), []  # type: ignore[arg-type]
        for number in range(first // size, math.ceil(last / size)):
            key = (size, self.seed, self.domain, self.epoch, number)
            if key != self._key:
                self._key, self._order = key, Order(*key)
            start = number * size
            parts.append(self._order[max(first - start, 0) : min(last - start, size)])
        return np.concatenate(parts)

    def _bucket(self, order: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> None:
        """Makes whole batches of samples (place, seed) of like length, in chunks that lie within one pass each."""
        batch, size = self.batch_size * self.num_replicas, len(lengths)
        generator = generator_of(self.seed, self.domain, self.epoch, "batches")
        for start in range(0, len(order), size):
            first, end = math.ceil(start / batch), min(start + size, len(order)) // batch
            for place in range(first, end, self.chunk):
                part = order[place * batch : min(place + self.chunk, end) * batch]
                batches = np.argsort(lengths[part[:, 0]], kind="stable").reshape(-1, batch)
                part[:] = part[generator.permutation(np.sort(batches, 1)).ravel()]  # within a batch as they were drawn
        whole = order[: min(size, len(order)) // batch * batch].reshape(-1, batch, 2)
        if len(whole):  # the longest comes first, so that what does not fit the memory is seen at once
            worst = lengths[whole[:, :, 0]].max(1).argmax()
            whole[[0, worst]] = whole[[worst, 0]]

    def _view(self, place: int, seed: int) -> SampleIndex:
        if self.views is None:
            return place, seed
        view = seed % (len(self.views) + 1)
        return (place, self.views[view - 1][place]) if view else place


class EvalSampler(DistributedSampler[Any]):
    """This process's part of the samples in their order, none of them twice (torch's own pads with repetitions).

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
