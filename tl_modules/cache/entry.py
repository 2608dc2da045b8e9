"""Builds a cache entry: what a recorder keeps of all samples of a loader, and their labels."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from tl_modules.batch import samples
from tl_modules.batch.samples import Padded
from tl_modules.cache.columns import Column, Ragged, Table, Uniform
from tl_modules.cache.cut import CannotCut
from tl_modules.cache.memory import free_memory
from tl_modules.cache.recorder import Recorder
from tl_modules.cache.schedule import DISK, Pace, pays
from tl_modules.cache.store import Growing, Mapped, Spec, Store, size_of
from tl_modules.cache.together import all_agree, together
from tl_modules.module import TransferModule

BATCH = 32  # samples that pass through the frozen stages at once, at most; fewer if training batches are smaller
SHARE = 0.5  # of the free memory, for an entry that cannot be on disk
MEASURED = 3  # batches to measure, after a first one


class Builder:
    """Reads, records and writes the samples of a loader.

    Args:
        trainer: The run's trainer.
        module: The module; in eval mode while recording.
        loader: The loader of the samples.
        indices: The sample of each row of the entry, with the seeds of its views.
        store: The store that holds the entry.
        dtype: Storage type of floating-point activations; None keeps the computed type.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: TransferModule,
        loader: Any,
        indices: Sequence[Any],
        store: Store,
        dtype: torch.dtype | None,
    ) -> None:
        self.trainer, self.module, self.loader, self.indices = trainer, module, loader, indices
        self.store, self.dtype = store, dtype
        self.few = sorted({round(i * (len(indices) - 1) / 3) for i in range(4)})
        self.saved: float | None = None

    def example(self) -> tuple[Any, Any]:
        """Reads x and y of a few samples spread over the data."""
        return next(self._read([self.indices[i] for i in self.few], len(self.few)))

    def earlier(self, cut: Recorder, key: str) -> Table | None:
        """Opens an earlier run's entry, if a few recomputed samples agree: the key does not cover every change."""
        tensors = self.store.open(key)
        if tensors is None:
            return None
        with evaluating(self.module):
            x, y = self.example()
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                fresh = samples.move(self._stored(cut.record(x)), "cpu"), y
        table = _table(fresh, tensors, len(self.indices))
        if table is None or not _same(table.take(torch.tensor(self.few)), fresh):
            self.store.remove(key)
            return None
        return table

    def build(self, cut: Recorder, key: str | None, passes: float) -> Table:
        """Runs all samples through the frozen stages, divided among a machine's processes; all succeed, or none.

        Args:
            cut: The recorder.
            key: The entry's name; None if it is for this run only.
            passes: How often each sample will be read.

        Raises:
            CannotCut: An entry is not possible, or would cost more than it saves.
        """
        trainer = self.trainer
        self.rank, self.world = (trainer.local_rank, trainer.num_devices) if trainer.world_size > 1 else (0, 1)
        token = f"{trainer.strategy.broadcast(uuid.uuid4().hex)}.{trainer.node_rank}"
        name = key or "0" * 32  # never committed, so never found
        self.pace = Pace(overlaps=self.loader.num_workers > 0 or not cut.spares_reading)
        # with unequal shapes, larger batches have more samples of one shape
        self.size = batch_size(self.loader) * (8 if cut.ragged else 1)
        with evaluating(self.module):
            batches = self._batches(cut)
            first = together(trainer, lambda: self._first(batches, checked=key is not None))
            specs = _specs(first[0][1], len(self.indices))
            ragged = sum(_bytes(leaf) for leaf in samples.leaves(first[0][1]) if isinstance(leaf, Padded))
            size = size_of(specs) + ragged * len(self.indices) // len(first[0][0])
            on_disk, tensors = self._room(specs, name, token, size)
            try:
                self._write_all(first, batches, tensors, passes, size)
                tensors = self._close(tensors)
                if on_disk and key:
                    together(trainer, lambda: self.store.commit(key, token, tensors) if self.rank == 0 else None)
            finally:
                if on_disk and self.rank == 0:
                    self.store.drop(name, token)
        table = _table(first[0][1], [Mapped(tensor) for tensor in tensors], len(self.indices))
        assert table is not None
        return table

    def _first(self, batches: Iterator[Any], checked: bool) -> Any:
        if not checked:
            _check_deterministic(self.loader, self.indices)
        return next(batches)

    def _read(self, indices: Sequence[Any], size: int) -> Iterator[tuple[Any, Any]]:
        for batch in self.loader.read(indices, size):
            x, y = batch[:2]
            x = samples.move(x, self.module.device, non_blocking=True)
            yield self.trainer.precision_plugin.convert_input(x), y

    def _batches(self, cut: Recorder) -> Iterator[list[tuple[list[int], Any]]]:
        """Yields rows of the entry and their contents, the samples of a batch in groups of one shape."""
        mine, done = range(self.rank, len(self.indices), self.world), 0
        batches, size = self._read([self.indices[row] for row in mine], self.size), self.size
        while True:
            with self.pace.measure("read", min(size, max(1, len(mine) - done))):
                x, y = next(batches, (None, None))
            if x is None:
                return
            found, count = [], samples.count(x)
            with self.pace.measure("record", count):
                for rows, part in cut.groups(x, batch_size(self.loader)):
                    tree = self._record(cut, part), samples.take(y, torch.tensor(rows)) if y is not None else None
                    found.append(([mine[done + row] for row in rows], tree))
            if cut.ragged and len(self.pace.seconds["frozen"]) < MEASURED:
                some = samples.take(x, slice(0, batch_size(self.loader)))
                with self.pace.measure("frozen", samples.count(some)):
                    self._record(cut, some)
            elif not cut.ragged:
                self.pace.seconds["frozen"].append(self.pace.seconds["record"][-1])
            done += count
            yield found

    def _record(self, cut: Recorder, x: Any) -> Any:
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            return samples.move(self._stored(cut.record_group(x)), "cpu")

    def _stored(self, tree: Any) -> Any:
        return samples.map_leaves(lambda leaf: converted(leaf, self.dtype), tree)

    def _write_all(self, first: Any, batches: Iterator[Any], tensors: list[Any], passes: float, size: int) -> None:
        def write(groups: Sequence[tuple[list[int], Any]]) -> None:
            with self.pace.measure("write", sum(len(rows) for rows, _ in groups)):
                for rows, tree in groups:
                    self._write(rows, tree, tensors)
            callbacks = cast(Any, self.trainer).callbacks
            if self.trainer.world_size == 1 and any(getattr(c, "signal", 0) for c in callbacks):
                raise CannotCut("a signal asks the run to stop")  # there may be no time to finish the entry

        def start() -> None:
            write(first)
            for _ in range(MEASURED):
                groups = next(batches)
                write(groups)
                for rows, (tree, _) in groups[:1]:
                    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
                    with self.pace.measure("take", len(rows)):
                        samples.take(tree, order)
            each = size / len(self.indices)
            beyond = each / DISK if size > SHARE * free_memory() else 0.0
            self.saved = self.pace.saved(len(self.indices) // self.world, passes, beyond)
            if self.rank == 0 and not pays(self.saved):
                raise CannotCut(f"an entry would cost about {-(self.saved or 0):.0f} s more than it saves")

        def rest() -> None:
            for groups in batches:
                write(groups)

        if len(self.indices) // self.world > (1 + MEASURED) * self.size:
            together(self.trainer, start)
        else:
            together(self.trainer, lambda: write(first))
        together(self.trainer, rest)

    def _write(self, rows: Sequence[int], tree: Any, tensors: Sequence[Any]) -> None:
        targets, index = iter(tensors), slice(rows[0], rows[-1] + 1, self.world)
        where = index if list(rows) == list(range(rows[0], rows[-1] + 1, self.world)) else torch.tensor(rows)
        for leaf in samples.leaves(tree):
            if isinstance(leaf, Padded):
                growing, starts, shapes = next(targets), next(targets), next(targets)
                try:
                    for row, one in zip(rows, leaf.tensors(), strict=True):
                        starts[row], shapes[row] = growing.append(one), torch.tensor(one.shape)
                except OSError as error:
                    raise CannotCut(f"the entry cannot be written ({error.strerror})") from error
            else:
                next(targets)[where] = leaf

    def _close(self, tensors: list[Any]) -> list[Tensor]:
        """Joins the parts that the processes have written."""
        mine = slice(self.rank, None, self.world)
        growing = [number for number, each in enumerate(tensors) if isinstance(each, Growing)]
        if growing:
            together(self.trainer, lambda: [tensors[n].close() for n in growing])
        for number in growing if self.rank else ():
            tensors[number + 1][mine] += tensors[number].offset()
        if growing:
            together(self.trainer, lambda: None)  # wait until every process has read the sizes
            together(self.trainer, lambda: [tensors[n].join(self.world) for n in growing if self.rank == 0])
        # wait until all have mapped the entry before the first process commits or removes it
        return together(self.trainer, lambda: [e.tensor() if isinstance(e, Growing) else e for e in tensors])

    def _room(self, specs: list[Spec], name: str, token: str, size: int) -> tuple[bool, list[Any]]:
        """Allocates the entry on disk, or in RAM if the disk is full or read-only."""
        reason = self.store.room(size)
        if all_agree(self.trainer, reason is None):
            more, rank = size - size_of(specs), self.rank
            mine = together(self.trainer, lambda: None if rank else self.store.begin(name, token, specs, size=more))
            return True, together(self.trainer, lambda: mine or self.store.begin(name, token, specs, False, rank))
        if self.trainer.world_size == 1 and size < SHARE * free_memory():
            return False, [Growing(d) if shape is None else torch.empty(shape, dtype=d) for shape, d in specs]
        raise CannotCut(f"{reason or 'another process has no room'}")


def converted(leaf: Any, dtype: torch.dtype | None) -> Any:
    """Casts a floating-point leaf; None keeps its type."""
    values = leaf.values if isinstance(leaf, Padded) else leaf
    return leaf.to(dtype) if dtype is not None and values.is_floating_point() else leaf


def batch_size(loader: Any) -> int:
    """Returns how many samples pass through the frozen stages at once."""
    return min(BATCH, int(loader.batch_size))


@contextmanager
def evaluating(module: TransferModule) -> Iterator[None]:
    """Keeps the module in eval mode."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _specs(tree: Any, rows: int) -> list[Spec]:
    """Lists shapes and types of the tensors that hold `rows` rows like those of a tree."""
    specs: list[Spec] = []
    for leaf in samples.leaves(tree):
        if isinstance(leaf, list):
            raise CannotCut("its labels are not tensors")
        if isinstance(leaf, Padded):
            axes = leaf.values.ndim - 1
            specs += [(None, leaf.values.dtype), ((rows,), torch.int64), ((rows, axes), torch.int64)]
        else:
            specs.append(((rows, *leaf.shape[1:]), leaf.dtype))
    return specs


def _table(template: Any, mapped: Sequence[Mapped], rows: int) -> Table | None:
    """Makes columns of an entry's tensors; None if they do not match the template."""
    specs = _specs(template, rows)
    if len(specs) != len(mapped):
        return None
    for (shape, dtype), tensor in zip(specs, (each.values for each in mapped), strict=True):
        if tensor.dtype != dtype or (tensor.ndim != 1 if shape is None else tuple(tensor.shape) != shape):
            return None
    given, columns = iter(mapped), list[Column]()
    for leaf in samples.leaves(template):
        first = next(given)
        if isinstance(leaf, Padded):
            starts, shapes = next(given), next(given)
            if not (starts.verify() and shapes.verify()):
                return None
            columns.append(Ragged(first.values, starts.values, shapes.values, first.checksums))
        else:
            columns.append(Uniform(first.values, first.checksums))
    return Table(columns, samples.take(template, slice(0, 1)))


def _bytes(leaf: Padded) -> int:
    return sum(row.nbytes for row in leaf.tensors())


def _same(old: Any, new: Any) -> bool:
    """Returns whether trees are equal up to rounding."""
    pairs = zip(samples.leaves(old), samples.leaves(new), strict=True)
    return all(_close(a, b) for pair in pairs for a, b in zip(*map(_rows, pair), strict=True))


def _rows(leaf: Any) -> list[Tensor]:
    return leaf.tensors() if isinstance(leaf, Padded) else [leaf]


def _close(old: Tensor, new: Tensor) -> bool:
    if old.shape != new.shape or not old.numel():
        return old.shape == new.shape
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-4}.get(old.dtype, 2e-2)
    if not old.is_floating_point():
        return torch.equal(new, old)
    return bool((new.float() - old.float()).abs().max() <= tolerance * (1 + old.float().abs().max()))


def _check_deterministic(loader: Any, indices: Sequence[Any]) -> None:
    """Reads the first and last samples twice and compares.

    Raises:
        CannotCut: They differ.
    """
    for index in [*indices[:4], *indices[-4:]]:  # the last ones are augmented, if any are
        first, second = (loader.dataset[index][0] for _ in range(2))
        same = torch.equal(first, second) if isinstance(first, Tensor) else pickle.dumps(first) == pickle.dumps(second)
        if not same:
            raise CannotCut("the data set draws unseeded random numbers")
