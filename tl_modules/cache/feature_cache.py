"""Runs frozen stages once: while they stay frozen, training and evaluation continue from their cached output.

    FeatureExtraction   images -> [ frozen ] -> features ............. cached -> head
    LastStages(1)       images -> [ frozen ] -> activations .......... cached -> last stage -> head
    GradualUnfreezing   the same, with other activations after each unfreezing
    Distill, ...        images -> [ teacher ] -> its outputs ......... cached, and given beside the batch

An entry's key covers everything that its contents depend on: weights, buffers and attributes of what does not train,
its code, the data and their preparation, precision and versions (`fingerprints.py`). If one of these cannot be named,
the entry is used in this run only, so that no entry is ever stale.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import PIL
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from tl_modules.batch import samples
from tl_modules.batch.output import by_domain
from tl_modules.cache.columns import Table
from tl_modules.cache.cut import CannotCut, Cut
from tl_modules.cache.entry import Builder, batch_size, evaluating
from tl_modules.cache.fingerprints import Unnamed, named
from tl_modules.cache.frozen import divide
from tl_modules.cache.recorder import Answers, Recorder
from tl_modules.cache.rows import CachedBatches, TeacherOutputs, view_seeds
from tl_modules.cache.schedule import MANY, epochs_ahead, epochs_left, frozen_stages, share
from tl_modules.cache.store import Store, default_folder
from tl_modules.cache.together import all_agree, together
from tl_modules.errors import UserError
from tl_modules.evaluation.gather import eval_dataloaders
from tl_modules.evaluation.test_time import TestTimeAdaptation
from tl_modules.methods.base import Method
from tl_modules.methods.teacher import Distillation
from tl_modules.module import TransferModule

__all__ = ["FeatureCache"]

log = logging.getLogger(__name__)
VIEWS = "--cache.views 4 would cache four views of each sample, --data.augment none the unaugmented samples"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class FeatureCache(Callback):
    """Caches the outputs of frozen stages and of teachers, on disk and for later runs too.

    A new entry is made if at least two passes will read it, and a few measured batches do not show that it costs more
    than it saves; an entry of an earlier run is used at once. Training data with random augmentation are cached only as
    `views` fixed views; validation data always.

    Args:
        enabled: Whether to cache.
        views: How many views of each training sample are cached, the first unaugmented and the others augmented; each
            epoch draws one of them (with a teacher, training sees only these views). 0 does not cache augmented data.
        dtype: Storage type of floating-point activations; None keeps the computed type.
        folder: The folder of the entries; None is $TL_CACHE_DIR, or lightning-transfer in the user's cache folder.
        disk_gb: The total size of all entries; above it the least recently used ones are removed.
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
            raise UserError(f"views: {views} must not be negative; 0 does not cache augmented data")
        if disk_gb <= 0:
            raise UserError(f"disk_gb: {disk_gb} must be above 0; to disable the cache pass --cache.enabled false")
        self.enabled, self.views, self.dtype = enabled, views, dtype
        self.store = Store(Path(folder).expanduser() if folder else default_folder(), int(disk_gb * 1e9))
        self._forget()

    def _forget(self) -> None:
        # by number of frozen stages and kind of input; None if it cannot be cached, which is found out only once
        self.cuts: dict[Any, Cut | None] = {}
        # by loader and number of frozen stages
        self.entries: dict[tuple[Any, int], tuple[Table, Cut] | None] = {}
        # by loader and method; and the methods whose teachers run in every epoch
        self.answers: dict[tuple[Any, str], Table | None] = {}
        self.asked: set[str] = set()
        self.said: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resets the state of an earlier run."""
        self._forget()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches the cache here too, because a run resumed mid-epoch gets no on_train_epoch_start."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches cached activations to the training loaders of every domain."""
        loaders = by_domain(trainer.train_dataloader, DataLoader)
        self._teach(trainer, pl_module, loaders)
        training = {f"{name} train": loader for name, loader in loaders.items()}
        self._serve(trainer, pl_module, training, trainer.limit_train_batches)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches cached activations to the validation loaders."""
        loaders = {getattr(e, "purpose", "val"): e for e in eval_dataloaders(trainer)}
        self._serve(trainer, pl_module, loaders, trainer.limit_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches cached activations to the test loaders, unless the backbone adapts to the test data."""
        if any(isinstance(c, TestTimeAdaptation) and c.moves_backbone for c in cast(Any, trainer).callbacks):
            return
        self._serve(trainer, pl_module, {"test": trainer.test_dataloaders}, trainer.limit_test_batches)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Releases the entries."""
        self._forget()

    def _teach(self, trainer: Trainer, module: LightningModule, loaders: Mapping[str, Any]) -> None:
        """Makes the loaders add the teachers' outputs to each batch, unless the teachers have to run in every epoch."""
        ours = all(hasattr(loader, "beside") and hasattr(loader.sampler, "views") for loader in loaders.values())
        methods = module.named_methods() if isinstance(module, TransferModule) else []
        taught = {name: method for name, method in methods if isinstance(method, Distillation)}
        if not taught or not ours:
            return
        assert isinstance(module, TransferModule)
        changes = [type(m).__name__ for _, m in methods if type(m).transform_batch is not Method.transform_batch]
        off = "--cache.enabled is false" if not self.enabled else f"{changes[0]} changes the batches" if changes else ""
        tables: dict[str, dict[str, Table]] = {domain: {} for domain in loaders}
        for name, method in taught.items():
            owners = method.owners(loaders)
            served = {d: loader for d, loader in loaders.items() if d.partition("/")[0] in owners}
            if off:
                self._say(trainer, f"the teacher of {name} runs in every epoch: {off}")
            found = {} if off else {d: self._taught(trainer, module, each, d, name) for d, each in served.items()}
            if off or None in found.values():
                self.asked.add(name)
                continue
            for domain, table in found.items():
                tables[domain][name] = cast(Table, table)
        for domain, loader in loaders.items():
            fixed = tables[domain] and loader.dataset.transform is not None
            loader.sampler.views = self._view_seeds(loader) if fixed else None
            loader.beside = (
                TeacherOutputs(loader, tables[domain], self._views(loader), cast(Any, module.dtype))
                if tables[domain]
                else None
            )

    def _taught(self, trainer: Trainer, module: TransferModule, loader: Any, domain: str, name: str) -> Table | None:
        """Returns the outputs of a method's teacher for a loader's samples; None if the teacher has to run."""
        if (loader, name) in self.answers:
            return self.answers[loader, name]
        views, method = self._views(loader), dict(module.named_methods())[name]
        who, owner = f"{domain} train: the teacher of {name} runs", domain.partition("/")[0]
        table = None
        if views:
            teachers = [(type(t), t.backbone, t.bottleneck, t.head, t.schema) for t in method.teachers(module)]
            what = type(method).ask, vars(method).get("stage"), owner, module.backbone.prepare, *teachers
            passes = epochs_left(trainer) * share(trainer.limit_train_batches, len(loader))

            def recorder(x: Any) -> Answers:
                return together(trainer, lambda: Answers(module, method, owner, x))

            key = together(trainer, lambda: self._key(trainer, module, loader, views, what))
            try:
                subject = f"{domain} train: outputs of the teacher of {name}"
                found = self._entry(trainer, module, loader, views, passes, key, recorder, subject, who)
                table = found and found[0]
            except CannotCut as reason:
                self._say(trainer, f"{who} in every epoch: {reason}")
        else:
            self._say(trainer, f"{who} in every epoch: augmentation changes what it sees; {VIEWS}")
        self.answers[loader, name] = table
        return table

    def _serve(self, trainer: Trainer, module: LightningModule, loaders: Mapping[str, Any], limit: Any) -> None:
        """Attaches the cached activations to each loader, or detaches them."""
        ours = {name: loader for name, loader in loaders.items() if hasattr(loader, "batch_source")}
        for loader in ours.values():
            loader.batch_source = None
        if not isinstance(module, TransferModule) or frozen_stages(trainer, module) == 0:
            return
        reason = self._off(module, loaders)
        if reason:
            self._say(trainer, f"the frozen stages run in every epoch: {reason}")
            return
        for name, loader in loaders.items():
            passes = epochs_ahead(trainer, module) * share(limit, len(loader))
            loader.batch_source = self._source(trainer, module, loader, name, passes)
            if loader.batch_source is not None:
                loader.stop()

    def _off(self, module: TransferModule, loaders: Mapping[str, Any]) -> str | None:
        """Returns why the cache is off for the whole run, or None."""
        steps = ("encode", "forward_domains", "training_step", "validation_step", "test_step", "_evaluate")
        own = [name for name in steps if getattr(type(module), name) is not getattr(TransferModule, name)]
        readers = [
            type(method).__name__
            for name, method in module.named_methods()
            if method.needs_raw_input and (name in self.asked or not isinstance(method, Distillation))
        ]
        if not self.enabled:
            return "--cache.enabled is false"
        if own:
            return f"{type(module).__name__} overrides {own[0]}, which may read the input"
        if readers:
            return f"{' and '.join(readers)} reads the input"
        if not all(hasattr(loader, "batch_source") for loader in loaders.values()):
            return "the loaders do not come from a TransferDataModule"
        return None

    def _source(
        self, trainer: Trainer, module: TransferModule, loader: Any, name: str, passes: float
    ) -> CachedBatches | None:
        frozen = frozen_stages(trainer, module)
        if frozen == 0:
            return None
        views = self._views(loader)
        if not views:
            self._say(
                trainer,
                f"{name}: augmentation changes the input of the frozen stages, so they run in every epoch; {VIEWS}",
            )
            return None
        if (loader, frozen) not in self.entries:
            # the previous activations are no longer needed
            self.entries = {k: e for k, e in self.entries.items() if k[0] is not loader}
            backbone, who = module.backbone, "the frozen stages run"
            what = "features" if frozen == len(backbone.stages()) else f"outputs of stage_{frozen - 1}"
            collate = loader.collate_fn.collate
            parts = backbone, frozen, module.uses_pooled_features, getattr(collate, "prepare", collate)
            resting = divide(backbone, frozen).may_train()
            key = together(trainer, lambda: self._key(trainer, module, loader, views, parts, resting))

            def cut(x: Any) -> Cut | None:
                return self._cut(trainer, module, frozen, x)

            try:
                found = self._entry(trainer, module, loader, views, passes, key, cut, f"{name}: {what}", who)
                self.entries[loader, frozen] = cast(Any, found)
            except CannotCut as reason:
                self.entries[loader, frozen] = None
                self._say(trainer, f"{name}: {who} in every epoch: {reason}")
        entry = self.entries[loader, frozen]
        dtype = cast(Any, module.dtype) if self.dtype else None
        return None if entry is None else CachedBatches(loader, *entry, views, dtype)

    def _views(self, loader: Any) -> int:
        """Returns how many views of each sample are cached."""
        return self.views if loader.dataset.transform is not None else 1

    def _view_seeds(self, loader: Any) -> list[list[int]]:
        """Returns the seeds of each view except the first, the unaugmented sample; the same in every run."""
        count, views = len(loader.dataset), self._views(loader)
        return [view_seeds(view, views, loader.domain, count) for view in range(1, views)]

    def _cut(self, trainer: Trainer, module: TransferModule, frozen: int, x: Any) -> Cut | None:
        key = frozen, samples.kind(x)
        if key not in self.cuts:
            try:
                self.cuts[key] = together(trainer, lambda: Cut(module.backbone, frozen, x, module.uses_pooled_features))
            except CannotCut as reason:
                self.cuts[key] = None
                self._say(trainer, f"the frozen stages run in every epoch: {reason}")
        return self.cuts[key]

    def _entry(
        self,
        trainer: Trainer,
        module: TransferModule,
        loader: Any,
        views: int,
        passes: float,
        key: str | None,
        recorder: Callable[[Any], Recorder | None],
        what: str,
        who: str,
    ) -> tuple[Table, Recorder] | None:
        """Returns an earlier run's entry, or a new entry if enough passes will read it.

        Args:
            trainer: The run's trainer.
            module: The module that trains.
            loader: The loader of the samples.
            views: Number of views of each sample.
            passes: How often each sample will be read.
            key: The entry's name, or None.
            recorder: Makes the recorder from a few samples; None: this has failed before, and was logged.
            what: Names what is recorded, for messages.
            who: Names what runs if there is no entry, for messages.

        Raises:
            CannotCut: An entry is not possible.
        """
        count = len(loader.dataset)
        indices = [*range(count), *((row, seed) for view in self._view_seeds(loader) for row, seed in enumerate(view))]
        few = f"{who} in every epoch: fewer than two epochs would read an entry"
        if passes < 2 and not all_agree(trainer, key is not None and self.store.has(key)):
            self._say(trainer, few)
            return None
        builder = Builder(trainer, module, loader, indices, self.store, DTYPES.get(self.dtype or ""))
        x, _ = together(trainer, builder.example)
        cut = recorder(x)
        if cut is None:
            return None
        found = together(trainer, lambda: builder.earlier(cut, key) if key else None)
        if all_agree(trainer, found is not None):
            assert found is not None
            self._say(trainer, f"{what} of an earlier run, {count:,} samples, {_size(found)}")
            return found, cut
        if passes < 2:
            self._say(trainer, few)
            return None
        start = time.perf_counter()
        built = builder.build(cut, key, passes)
        less = f", about {max(0, builder.saved):.0f} s less in all" if builder.saved else ""
        ahead = f"; {passes:.0f} epochs continue from there{less}" if passes < MANY else ""
        self._say(trainer, f"{what} cached in {time.perf_counter() - start:.1f} s, {count:,} samples, "
                           f"{_size(built)}{ahead}")  # fmt: skip
        return built, cut

    def _key(
        self,
        trainer: Trainer,
        module: TransferModule,
        loader: Any,
        views: int,
        what: Sequence[Any],
        without: Collection[int] = (),
    ) -> str | None:
        """Returns the name of an entry; None if something cannot be named, so that it is for this run only."""
        view = loader.dataset
        data = view.fingerprint()
        if data is None:
            return None
        # the seeds of the views after the first
        domain = f"plain, {loader.domain}" if view.transform is not None else ""
        kinds, inner = [], view.dataset
        while inner is not None:  # a wrapper and the data set inside
            kinds.append(type(inner))
            inner = getattr(inner, "dataset", None)
        label = getattr(loader.collate_fn.collate, "label", None)  # a task's method, named by its code and the schema
        labels = getattr(label, "__func__", label), module.schema
        versions = [sys.version, torch.__version__, np.__version__, PIL.__version__]
        # rounding can depend on the number of rows in a batch
        size, world = batch_size(loader), trainer.num_devices if trainer.world_size > 1 else 1
        how = self.dtype, trainer.precision, module.device.type, versions, size, world
        parts = (*what, labels, kinds, view.transform, domain, views, data, *how)
        try:
            with evaluating(module):
                return named(*parts, without=without)[:32]
        except Unnamed as reason:
            self._say(trainer, f"an entry is for this run only: {reason}")
            return None

    def _say(self, trainer: Trainer, text: str) -> None:
        if trainer.is_global_zero and text not in self.said:
            self.said.add(text)
            log.info("cache: %s", text)


def _size(table: Table) -> str:
    return f"{table.nbytes / 1e6:.1f} MB"
