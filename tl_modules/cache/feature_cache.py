"""Runs what is frozen once: while stages stay closed, training and evaluation go on from their cached output.

    FeatureExtraction   images -> [ closed ] -> features .......... cached -> head
    LastStages(1)       images -> [ closed ] -> boundary .......... cached -> last stage -> head
    GradualUnfreezing   the same, with a new boundary at each opening

An entry's key is made of all that its contents depend on: weights, buffers and attributes of what runs up to the
boundary, its code, the data, the transforms, precision and versions (`fingerprints.py`). Where one of these cannot be
named, the entry serves this run only, so that none is ever stale.
"""

from __future__ import annotations

import logging
import math
import sys
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import PIL
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from tl_modules.batch.cached import CachedActivations
from tl_modules.batch.output import by_domain
from tl_modules.batch.samples import Batch
from tl_modules.cache.cut import Cut, NotCut, check, cut, run_trunk
from tl_modules.cache.fingerprints import Unnamed, named
from tl_modules.cache.memory import free_memory
from tl_modules.cache.store import Store, default_folder
from tl_modules.cache.together import all_agree, together
from tl_modules.errors import UserError
from tl_modules.evaluation.gather import evaluated
from tl_modules.evaluation.test_time import TestTimeAdaptation
from tl_modules.module import TransferModule

__all__ = ["FeatureCache"]

log = logging.getLogger(__name__)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
BATCH = 32  # so many samples go through the closed stages at once, or fewer, where training takes fewer
MANY = 1000
SHARE = 0.5  # of the free memory that an entry may take where the disk is not to be had


class FeatureCache(Callback):
    """Caches the output of the closed stages, on disk and for later runs too.

    Caching begins where at least two passes read the entry, or an earlier run left it. Training data with random
    augmentation are cached only as `views` fixed views; validation data always.

    Args:
        enabled: Whether to cache.
        views: So many augmented views of each training sample are cached, and each epoch draws one of them; 0 caches
            no augmented data.
        dtype: What floating-point activations are stored as; None as they are computed.
        folder: Where; None is $TL_CACHE_DIR, or lightning-transfer in the user's cache folder.
        disk_gb: The least recently used entries are removed where all together would take more.
    """

    def __init__(
        self,
        enabled: bool = True,
        views: int = 0,
        dtype: Literal["float16", "bfloat16"] | None = None,
        folder: str | None = None,
        disk_gb: float = 50.0,
    ) -> None:
        if views < 0:
            raise UserError(f"views: {views} must not be negative; 0 caches no augmented data")
        if disk_gb <= 0:
            raise UserError(f"disk_gb: {disk_gb} must be above 0; to cache nothing pass --cache.enabled false")
        self.enabled, self.views, self.dtype = enabled, views, dtype
        self.store = Store(Path(folder).expanduser() if folder else default_folder(), int(disk_gb * 1e9))
        self._forget()

    def _forget(self) -> None:
        self.cuts: dict[int, Cut | None] = {}
        # by loader and closed stages; None where there is to be no entry, which is found out once
        self.entries: dict[tuple[Any, int], list[Tensor] | None] = {}
        self.said: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier run."""
        self._forget()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Serves an epoch that is gone on with; any other is served when it starts."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Serves the training data of every domain."""
        loaders = by_domain(trainer.train_dataloader, DataLoader)
        training = {f"{name} train": loader for name, loader in loaders.items()}
        self._serve(trainer, pl_module, training, trainer.limit_train_batches)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Serves the validation data."""
        loaders = {getattr(e, "role", "val"): e for e in evaluated(trainer)}
        self._serve(trainer, pl_module, loaders, trainer.limit_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Serves the test data, but not to a backbone that adapts to it."""
        if any(isinstance(c, TestTimeAdaptation) and c.moves_backbone for c in cast(Any, trainer).callbacks):
            return
        self._serve(trainer, pl_module, {"test": trainer.test_dataloaders}, trainer.limit_test_batches)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the entries."""
        self._forget()

    def _serve(self, trainer: Trainer, module: LightningModule, loaders: Mapping[str, Any], limit: Any) -> None:
        """Lets each loader give cached activations, or read where that is not to be."""
        ours = {name: loader for name, loader in loaders.items() if hasattr(loader, "memory")}
        for loader in ours.values():
            loader.memory = None
        if not isinstance(module, TransferModule) or _closed(trainer, module) == 0:
            return
        reason = self._off(module, loaders)
        if reason:
            self._say(trainer, f"the frozen stages run in every epoch: {reason}")
            return
        for name, loader in loaders.items():
            passes = _passes(trainer, module) * _share(limit, len(loader))
            loader.memory = self._memory(trainer, module, loader, name, passes)
            if loader.memory is not None:
                loader.stop()

    def _off(self, module: TransferModule, loaders: Mapping[str, Any]) -> str | None:
        """What switches the cache off for the whole run, or None."""
        steps = ("forward_domains", "training_step", "validation_step", "test_step", "_evaluate")
        own = [name for name in steps if getattr(type(module), name) is not getattr(TransferModule, name)]
        readers = [type(method).__name__ for _, method in module.named_methods() if method.reads_x]
        if not self.enabled:
            return "--cache.enabled is false"
        if own:
            return f"{type(module).__name__} has a {own[0]} of its own, which may look at the input"
        if readers:
            return f"{' and '.join(readers)} looks at the input"
        if not all(hasattr(loader, "memory") for loader in loaders.values()):
            return "the loaders are not those of a TransferDataModule"
        return None

    def _memory(
        self, trainer: Trainer, module: TransferModule, loader: Any, name: str, passes: float
    ) -> _Memory | None:
        view, closed = loader.dataset, _closed(trainer, module)
        if closed == 0:
            return None
        views = self.views if view.transform is not None else 1
        if not views:
            self._say(trainer, f"{name}: augmentation changes what the frozen stages see, so they run in every epoch; "
                               "--cache.views 4 would cache four augmented views of each sample")  # fmt: skip
            return None
        both = self._cut(trainer, module, closed)
        if both is None:
            return None
        if (loader, closed) not in self.entries:
            # the boundary before is not needed any more
            self.entries = {k: e for k, e in self.entries.items() if k[0] is not loader}
            try:
                self.entries[loader, closed] = self._entry(trainer, module, loader, name, both, views, passes)
            except NotCut as reason:
                self.entries[loader, closed] = None
                self._say(trainer, f"{name}: the frozen stages run in every epoch: {reason}")
        entry = self.entries[loader, closed]
        dtype = module.dtype if self.dtype else None
        return None if entry is None else _Memory(view, entry, both, views, cast(Any, dtype))

    def _cut(self, trainer: Trainer, module: TransferModule, closed: int) -> Cut | None:
        if closed not in self.cuts:
            try:
                self.cuts[closed] = cut(module.backbone, closed)
            except NotCut as reason:
                self.cuts[closed] = None
                self._say(trainer, f"the frozen stages run in every epoch: {reason}")
        return self.cuts[closed]

    def _entry(
        self, trainer: Trainer, module: TransferModule, loader: Any, name: str, both: Cut, views: int, passes: float
    ) -> list[Tensor] | None:
        """What an earlier run left, or a new entry where enough passes will read it.

        Raises:
            NotCut: There can be no entry.
        """
        samples, what = len(loader.dataset), _what(both, module)
        key = together(trainer, lambda: self._key(trainer, module, loader, both, views))
        # a sample's views are the same in every run
        seeds = [_view_seeds(view, loader.domain, samples) for view in range(views)]
        places = [(row, seed) for view in seeds for row, seed in enumerate(view)]

        def earlier() -> list[Tensor] | None:
            found = self.store.open(key) if key else None
            if found and not self._holds(trainer, module, loader, places, both, found):
                found = None
                self.store.remove(str(key))
            return found

        found = together(trainer, earlier)
        if all_agree(trainer, found is not None):
            assert found is not None
            self._say(trainer, f"{name}: {what} of an earlier run, {samples:,} samples, {_size(found)}")
            return found
        if passes < 2:
            self._say(trainer, "the frozen stages run in every epoch: fewer than two epochs would read an entry")
            return None
        start = time.perf_counter()
        with _evaluating(module):
            built = self._build(trainer, module, loader, places, both, key)
        saved = f"; {passes:.0f} epochs go on from there" if passes < MANY else ""
        self._say(trainer, f"{name}: {what} cached in {time.perf_counter() - start:.1f} s, {samples:,} samples, "
                           f"{_size(built)}{saved}")  # fmt: skip
        return built

    def _build(
        self, trainer: Trainer, module: TransferModule, loader: Any, places: Sequence[Any], both: Cut, key: str | None
    ) -> list[Tensor]:
        """Sends all samples through the closed stages, each process of a machine its part; all go on, or none."""
        rank, world = (trainer.local_rank, trainer.num_devices) if trainer.world_size > 1 else (0, 1)
        token = f"{trainer.strategy.broadcast(uuid.uuid4().hex)}.{trainer.node_rank}"
        name = key or "0" * 32  # never finished, so never found
        batches = iter(loader.read(places[rank::world], _batch(loader)))

        def first() -> list[Tensor]:
            if key is None:
                _check_deterministic(loader, places)
            x, y, _ = next(batches)
            return self._rows(trainer, module, both, x, y, first=True)

        def rest(rows: list[Tensor]) -> None:
            done = 0
            while True:
                for whole, part in zip(tensors, rows, strict=True):
                    whole[rank::world][done : done + len(part)].copy_(part)
                done += len(rows[0])
                if trainer.world_size == 1 and any(getattr(c, "signal", 0) for c in cast(Any, trainer).callbacks):
                    raise NotCut("a signal asks to stop")  # there may be no time to finish the entry
                batch = next(batches, None)
                if batch is None:
                    return
                rows = self._rows(trainer, module, both, *batch[:2])

        rows = together(trainer, first)
        specs = [((len(places), *part.shape[1:]), part.dtype) for part in rows]
        on_disk, tensors = self._room(trainer, specs, name, token, rank)
        try:
            together(trainer, lambda: rest(rows))
            if on_disk and key:
                together(trainer, lambda: self.store.commit(key, token, tensors) if rank == 0 else None)
        finally:
            if on_disk and rank == 0:
                self.store.drop(name, token)
        return tensors

    def _rows(
        self, trainer: Trainer, module: TransferModule, both: Cut, x: Tensor, y: Any, first: bool = False
    ) -> list[Tensor]:
        """What an entry holds of a batch."""
        x = trainer.precision_plugin.convert_input(x.to(module.device, non_blocking=True))
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            boundary = run_trunk(both, x)
            if first:
                check(both, module.backbone, x, boundary)
        rows = [self._stored(part) for part in boundary]
        if y is not None and not isinstance(y, Tensor):
            raise NotCut("its labels are not tensors")
        return rows if y is None else [*rows, y]

    def _holds(
        self,
        trainer: Trainer,
        module: TransferModule,
        loader: Any,
        places: Sequence[Any],
        both: Cut,
        found: list[Tensor],
    ) -> bool:
        """Whether a few samples still give what an earlier run stored, whatever the key cannot know."""
        few = sorted({round(i * (len(places) - 1) / 3) for i in range(4)})
        with _evaluating(module):
            for x, y, _ in loader.read([places[i] for i in few], len(few)):
                rows = self._rows(trainer, module, both, x, y)
        return len(rows) == len(found) and all(
            len(old) == len(places) and new.shape == old[few].shape and _close(new.cpu(), old[few])
            for new, old in zip(rows, found, strict=True)
        )

    def _room(self, trainer: Trainer, specs: list[Any], name: str, token: str, rank: int) -> tuple[bool, list[Tensor]]:
        """Tensors on disk, or in memory where the disk is not to be had."""
        size = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in specs)
        reason = self.store.room(size)
        if all_agree(trainer, reason is None):
            together(trainer, lambda: self.store.begin(name, token, specs) if rank == 0 else None)
            return True, together(trainer, lambda: self.store.begin(name, token, specs, create=False))
        if trainer.world_size == 1 and size < SHARE * free_memory():
            return False, [torch.empty(shape, dtype=dtype) for shape, dtype in specs]
        raise NotCut(f"{reason or 'another process has no room'}")

    def _stored(self, part: Tensor) -> Tensor:
        return part.to(DTYPES[self.dtype]) if self.dtype and part.is_floating_point() else part

    def _key(self, trainer: Trainer, module: TransferModule, loader: Any, both: Cut, views: int) -> str | None:
        """The name of an entry; None where something cannot be named, so that it serves this run only."""
        view = loader.dataset
        data = view.fingerprint()
        if data is None:
            return None
        domain = loader.domain if view.transform is not None else ""  # which seeds the views
        kinds, inner = [], view.dataset
        while inner is not None:  # what wraps a data set, and that one
            kinds.append(type(inner))
            inner = getattr(inner, "dataset", None)
        versions = [sys.version, torch.__version__, np.__version__, PIL.__version__]
        # the rounding of a batch's rows can depend on how many there are
        size, world = _batch(loader), trainer.num_devices if trainer.world_size > 1 else 1
        try:
            with _evaluating(module):
                return named(both.trunk, kinds, view.transform, domain, views, data, self.dtype, trainer.precision,
                             module.device.type, versions, size, world)[:32]  # fmt: skip
        except Unnamed as reason:
            self._say(trainer, f"an entry serves this run only: {reason}")
            return None

    def _say(self, trainer: Trainer, text: str) -> None:
        if trainer.is_global_zero and text not in self.said:
            self.said.add(text)
            log.info("cache: %s", text)


class _Memory:
    """Gives a batch of an entry in place of a batch that is read.

    Args:
        view: The data that the entry holds.
        tensors: The boundary, and last, where they are not hidden, the labels.
        both: The cut that the boundary belongs to.
        views: How many views of each sample there are.
        dtype: What converted activations are computed with; None leaves them.
    """

    def __init__(self, view: Any, tensors: list[Tensor], both: Cut, views: int, dtype: torch.dtype | None) -> None:
        self.view, self.tail, self.views, self.dtype = view, both.tail, views, dtype
        self.parts = tensors if view.label == "none" else tensors[:-1]
        self.y = None if view.label == "none" else tensors[-1]

    def __call__(self, places: Sequence[Any]) -> Batch:
        """The batch at these places: row numbers, or row numbers with the seeds that choose a view."""
        pairs = [place if isinstance(place, tuple) else (place, 0) for place in places]
        index = torch.tensor([row + len(self.view) * (seed % self.views) for row, seed in pairs])
        boundary = tuple(part.index_select(0, index) for part in self.parts)
        if self.dtype is not None:
            boundary = tuple(part.to(self.dtype) if part.is_floating_point() else part for part in boundary)
        labels = None if self.y is None else self.y.index_select(0, index)
        rows = torch.tensor([self.view.rows[row] for row, _ in pairs])
        return Batch(CachedActivations(boundary, self.tail, lambda count: self._read(pairs[:count])), labels, rows)

    def _read(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        xs: Tensor = default_collate([self.view[pair][0] for pair in pairs])
        return xs


def _closed(trainer: Trainer, module: TransferModule, later: int = 0) -> int:
    """How many stages are still closed in the last step of the present epoch, or of one `later`."""
    strategy = module.finetuning
    now: float = trainer.current_epoch + later
    if trainer.state.fn != "fit":
        now = strategy.end
    elif strategy.unit != "epochs":
        steps = trainer.estimated_stepping_batches  # also loads the training data
        each = trainer.num_training_batches / trainer.accumulate_grad_batches
        now = strategy.end if each == math.inf else (now + 1) * math.ceil(each) - 1  # what opens after it is later
        now = now / steps if strategy.unit == "fraction" else now
    trainable = strategy.trainable_stages(now, module.num_stages)
    return trainable.start if trainable else module.num_stages


def _passes(trainer: Trainer, module: TransferModule) -> int:
    """How many epochs, from the present one on, have the same stages closed."""
    if trainer.state.fn != "fit":
        return MANY  # the pass that fills the entry is the evaluation itself
    end = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else MANY
    closed, left = _closed(trainer, module), max(1, end - trainer.current_epoch)
    return next((n for n in range(1, left) if _closed(trainer, module, n) != closed), left)


def _batch(loader: Any) -> int:
    return min(BATCH, int(loader.batch_size))


@contextmanager
def _evaluating(module: TransferModule) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _close(new: Tensor, old: Tensor) -> bool:
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-4}.get(old.dtype, 2e-2)
    if not old.is_floating_point():
        return torch.equal(new, old)
    return bool((new.float() - old.float()).abs().max() <= tolerance * (1 + old.float().abs().max()))


def _share(limit: float | int | None, batches: int) -> float:
    """How much of the data an epoch sees."""
    if limit is None:
        return 1.0
    return limit if isinstance(limit, float) else min(1.0, limit / max(1, batches))


def _check_deterministic(loader: Any, places: Sequence[Any]) -> None:
    """Reads the first samples twice.

    Raises:
        NotCut: They differ.
    """
    for place in places[:8]:
        first, second = (loader.dataset[place][0] for _ in range(2))
        if not (isinstance(first, Tensor) and torch.equal(first, second)):
            raise NotCut("the data set draws random numbers of its own")


def _view_seeds(view: int, domain: str, samples: int) -> list[int]:
    """The seeds of one view of each sample, which differ between domains."""
    seeds: list[int] = np.random.default_rng([view, zlib.crc32(domain.encode())]).integers(2**62, size=samples).tolist()
    return seeds


def _what(both: Cut, module: TransferModule) -> str:
    return "features" if both.trunk is module.backbone else f"what leaves stage_{both.closed - 1}"


def _size(tensors: Sequence[Tensor]) -> str:
    return f"{sum(t.nbytes for t in tensors) / 1e6:.1f} MB"
