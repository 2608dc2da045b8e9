"""Runs what is frozen once: while stages stay frozen, training and evaluation go on from their cached output.

    FeatureExtraction   images -> [ frozen ] -> features ............. cached -> head
    LastStages(1)       images -> [ frozen ] -> activations .......... cached -> last stage -> head
    GradualUnfreezing   the same, with other activations at each opening
    Distill, ...        images -> [ teacher ] -> what it says ........ cached, and given beside the batch

An entry's key is made of all that its contents depend on: weights, buffers and attributes of what does not train, its
code, the data and how they are prepared, precision and versions (`fingerprints.py`). Where one of these cannot be
named, the entry serves this run only, so that none is ever stale.
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
from tl_modules.cache.rows import Beside, Memory, view_seeds
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
VIEWS = "--cache.views 4 would cache four views of each sample, --data.augment none the plain ones"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class FeatureCache(Callback):
    """Caches the output of the frozen stages and what teachers say, on disk and for later runs too.

    Caching begins where at least two passes read the entry and a few batches do not show that it would cost more than
    it saves, or where an earlier run left it. Training data with random augmentation are cached only as `views` fixed
    views; validation data always.

    Args:
        enabled: Whether to cache.
        views: How many views of each training sample are cached, the first plain and the others augmented; each epoch
            draws one of them (beside a teacher, training sees these views only). 0 caches no augmented data.
        dtype: The type in which floating-point activations are stored; None keeps the computed type.
        folder: The folder of the entries; None is $TL_CACHE_DIR, or lightning-transfer in the user's cache folder.
        disk_gb: The size of all entries together; beyond it the least recently used are removed.
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
        # by frozen stages and what the inputs are; None where there is to be none, which is found out once
        self.cuts: dict[Any, Cut | None] = {}
        # by loader and frozen stages
        self.entries: dict[tuple[Any, int], tuple[Table, Cut] | None] = {}
        # by loader and method; and the methods whose teachers are asked in every epoch
        self.answers: dict[tuple[Any, str], Table | None] = {}
        self.asked: set[str] = set()
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
        self._teach(trainer, pl_module, loaders)
        training = {f"{name} train": loader for name, loader in loaders.items()}
        self._serve(trainer, pl_module, training, trainer.limit_train_batches)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Serves the validation data."""
        loaders = {getattr(e, "purpose", "val"): e for e in eval_dataloaders(trainer)}
        self._serve(trainer, pl_module, loaders, trainer.limit_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Serves the test data, but not to a backbone that adapts to it."""
        if any(isinstance(c, TestTimeAdaptation) and c.moves_backbone for c in cast(Any, trainer).callbacks):
            return
        self._serve(trainer, pl_module, {"test": trainer.test_dataloaders}, trainer.limit_test_batches)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the entries."""
        self._forget()

    def _teach(self, trainer: Trainer, module: LightningModule, loaders: Mapping[str, Any]) -> None:
        """Lets the loaders give what teachers say beside each batch, or methods ask where that is not to be."""
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
                Beside(loader, tables[domain], self._views(loader), cast(Any, module.dtype)) if tables[domain] else None
            )

    def _taught(self, trainer: Trainer, module: TransferModule, loader: Any, domain: str, name: str) -> Table | None:
        """What the teacher of a method says of a loader's samples; None where it is to be asked."""
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
                subject = f"{domain} train: what the teacher of {name} says"
                found = self._entry(trainer, module, loader, views, passes, key, recorder, subject, who)
                table = found and found[0]
            except CannotCut as reason:
                self._say(trainer, f"{who} in every epoch: {reason}")
        else:
            self._say(trainer, f"{who} in every epoch: augmentation changes what it sees; {VIEWS}")
        self.answers[loader, name] = table
        return table

    def _serve(self, trainer: Trainer, module: LightningModule, loaders: Mapping[str, Any], limit: Any) -> None:
        """Lets each loader give cached activations, or read where that is not to be."""
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
        """What switches the cache off for the whole run, or None."""
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
            return f"{type(module).__name__} has a {own[0]} of its own, which may look at the input"
        if readers:
            return f"{' and '.join(readers)} looks at the input"
        if not all(hasattr(loader, "batch_source") for loader in loaders.values()):
            return "the loaders are not those of a TransferDataModule"
        return None

    def _source(self, trainer: Trainer, module: TransferModule, loader: Any, name: str, passes: float) -> Memory | None:
        frozen = frozen_stages(trainer, module)
        if frozen == 0:
            return None
        views = self._views(loader)
        if not views:
            self._say(
                trainer,
                f"{name}: augmentation changes what the frozen stages see, so they run in every epoch; {VIEWS}",
            )
            return None
        if (loader, frozen) not in self.entries:
            # the activations before are not needed any more
            self.entries = {k: e for k, e in self.entries.items() if k[0] is not loader}
            backbone, who = module.backbone, "the frozen stages run"
            what = "features" if frozen == len(backbone.stages()) else f"what leaves stage_{frozen - 1}"
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
        return None if entry is None else Memory(loader, *entry, views, dtype)

    def _views(self, loader: Any) -> int:
        """How many views of each sample are cached."""
        return self.views if loader.dataset.transform is not None else 1

    def _view_seeds(self, loader: Any) -> list[list[int]]:
        """The seeds of each view but the first, the sample as it is; the same in every run."""
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
        """What an earlier run left, or a new entry where enough passes will read it.

        Args:
            trainer: Of the run.
            module: The one that trains.
            loader: Whose samples are recorded.
            views: Of each sample.
            passes: How often each sample will be seen.
            key: The entry's name, or None.
            recorder: Makes of a few samples what records; None: that has been given up, and said.
            what: Is recorded, for messages.
            who: Runs where it is not, for messages.

        Raises:
            CannotCut: There can be no entry.
        """
        count = len(loader.dataset)
        places = [*range(count), *((row, seed) for view in self._view_seeds(loader) for row, seed in enumerate(view))]
        few = f"{who} in every epoch: fewer than two epochs would read an entry"
        if passes < 2 and not all_agree(trainer, key is not None and self.store.has(key)):
            self._say(trainer, few)
            return None
        builder = Builder(trainer, module, loader, places, self.store, DTYPES.get(self.dtype or ""))
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
        ahead = f"; {passes:.0f} epochs go on from there{less}" if passes < MANY else ""
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
        """The name of an entry; None where something cannot be named, so that it serves this run only."""
        view = loader.dataset
        data = view.fingerprint()
        if data is None:
            return None
        # which seeds the views behind the plain one
        domain = f"plain, {loader.domain}" if view.transform is not None else ""
        kinds, inner = [], view.dataset
        while inner is not None:  # what wraps a data set, and that one
            kinds.append(type(inner))
            inner = getattr(inner, "dataset", None)
        label = getattr(loader.collate_fn.collate, "label", None)  # a task's method: by its code and the schema
        labels = getattr(label, "__func__", label), module.schema
        versions = [sys.version, torch.__version__, np.__version__, PIL.__version__]
        # the rounding of a batch's rows can depend on how many there are
        size, world = batch_size(loader), trainer.num_devices if trainer.world_size > 1 else 1
        how = self.dtype, trainer.precision, module.device.type, versions, size, world
        parts = (*what, labels, kinds, view.transform, domain, views, data, *how)
        try:
            with evaluating(module):
                return named(*parts, without=without)[:32]
        except Unnamed as reason:
            self._say(trainer, f"an entry serves this run only: {reason}")
            return None

    def _say(self, trainer: Trainer, text: str) -> None:
        if trainer.is_global_zero and text not in self.said:
            self.said.add(text)
            log.info("cache: %s", text)


def _size(table: Table) -> str:
    return f"{table.nbytes / 1e6:.1f} MB"
