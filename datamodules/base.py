"""The base class of all datamodules: domains with splits, and the convention that data and models share, the batch.

    training    {"source": (x, y, index), "target": (x, y, index)}    y is None where labels are hidden; index is the
                                                                      samples' numbers in their data set
                several sources are "source/photo", "source/sketch", ...; the labelled samples of a target that has
                unlabelled ones too are "target/labelled"
    evaluation  {"target": (x, y, index)}                             one domain
    prediction  {"target": (x, None, index)}

Datamodules do not know models, and models do not know datamodules: `schema` describes x and y, and the model's
`collate` makes batches of samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, Dataset

from datamodules.augmentation import Augmentation, transforms_of
from datamodules.errors import DataError
from datamodules.loaders import (
    EpochSampler,
    EvalSampler,
    IndexedSubset,
    Loader,
    Named,
    collate,
    cores,
    even_batch_size,
    ignore_signals,
    views_of,
)
from datamodules.splits import SPLITS, Joined, few_shots, ids_of, labels_of, log, named_labels, some_of_each


class TransferDataModule(LightningDataModule):
    """Loads source domains and/or a target; a subclass writes `domains` and describes x and y.

    If there is only a target, its labels are used (fine-tuning). **Beside a source the target's labels reach neither
    training nor model selection**, unless `target_labels` is true; validation then runs on the source's labelled
    samples, and also gives the model's outputs for the target's validation and test samples, without their labels.

    A data set is map-style and returns (x, y). Optional attributes: `targets`, all labels, for few shots and stratified
    splits; `ids`; `groups`, e.g. speakers, which are never divided between splits; `weights` of the loss; `lengths`, to
    batch similar lengths; `fingerprint()`, a text that changes whenever a sample does, needed to reuse cached features.

    Args:
        batch_size: Samples per domain in a step; a few less if the last batch would be tiny.
        num_workers: Processes that load data; 0 loads in the main process; None is one per core, at most 8.
        shots_per_class: Keeps this many labelled target training samples of each class.
        labelled: How many of the target's training samples have labels, balanced over the classes as far as possible;
            the others are unlabelled (semi-supervised). The draw, by `seed`, looks at all labels of the training split;
            nothing after it does. None: all of them, or none if the labels are hidden.
        unlabelled_ratio: Number of unlabelled target samples per labelled one in a step, beside `labelled`: mu of
            FixMatch (7 in the paper). A step has `batch_size` labelled samples and mu times as many unlabelled ones.
        target_labels: Whether training and model selection see the target's labels; None shows them if there is only a
            target (fine-tuning) and hides them beside a source (adaptation). False also hides them without a source
            (source-free adaptation).
        target_unseen: Excludes the target from training altogether (domain generalisation).
        selection_labels: This many labels of each class of the target's validation split, or "all", are visible to
            model selection (`--selection.criterion few` or `oracle`), and to nothing else.
        augment: none, light, strong, views (see `augmentation.transforms_of`), or a list of transforms of a training x,
            e.g. torchvision.transforms.v2.RandomHorizontalFlip. auto is light for photos if the whole
            backbone trains from the start, views for pretraining that compares views, otherwise none.
        drop_last: Drops the last training batch if it is smaller than the others.
        seed: Seeds splits, shots and shuffling.

    Attributes:
        x_schema: Describes x as plain data, e.g. {"image": {}}, or several inputs, {"photo": {"image": {}}, "title":
            {"text": {}}}; {} says nothing.
        y_schema: Describes y as plain data, e.g. {"boxes": ["car", "bus"]}; None derives it from the next two.
        class_names: Names of the classes, in the order of their numbers; None for real-valued labels.
        num_outputs: Number of values of a real-valued label.
        photos: Whether x are photos: they suit a network pretrained on photos, and may be flipped and cropped.
        collate: Makes a batch of samples (x, y, index); None takes the model's.
        views: Number of augmented views of a sample that a batch holds; requested by the model, see `resolve`.
        unlabelled: Whether training sees no labels at all; also requested by the model.
    """

    x_schema: Mapping[str, Any] = {}
    y_schema: Mapping[str, Any] | None = None
    num_outputs: int = 1
    class_names: list[str] | None = None
    photos: bool = False
    collate: Callable[[Sequence[Any]], Any] | None = None

    def __init__(
        self,
        batch_size: int = 32,
        num_workers: int | None = 0,
        shots_per_class: int | None = None,
        labelled: int | None = None,
        unlabelled_ratio: int = 1,
        target_labels: bool | None = None,
        target_unseen: bool = False,
        selection_labels: int | Literal["all"] | None = None,
        augment: list[nn.Module] | Augmentation | None = "auto",
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {"batch_size": batch_size, "shots_per_class": shots_per_class, "labelled": labelled}
        counts |= {"unlabelled_ratio": unlabelled_ratio, "num_workers": num_workers, "seed": seed}
        for name, count in counts.items():
            if count is not None and count < (least := 0 if name in ("num_workers", "seed") else 1):
                raise DataError(f"{name}: {count} must be at least {least}")
        self.batch_size, self.shots_per_class = batch_size, shots_per_class
        self.num_workers = min(8, cores()) if num_workers is None else num_workers
        if labelled is not None and (shots_per_class is not None or target_labels is not None or target_unseen):
            raise DataError(
                "labelled: it decides which of the target's labels training sees; leave shots_per_class, "
                "target_labels and target_unseen out"
            )
        if unlabelled_ratio > 1 and labelled is None:
            raise DataError(f"unlabelled_ratio: {unlabelled_ratio} needs --data.labelled N beside it")
        self.labelled, self.unlabelled_ratio = labelled, unlabelled_ratio
        if isinstance(selection_labels, int) and selection_labels < 1:
            raise DataError(f"selection_labels: {selection_labels} must be at least 1, or all")
        if target_labels and target_unseen:
            raise DataError(
                "target_labels, target_unseen: an unseen target is not used in training, so leave one of them out"
            )
        self.target_labels, self.target_unseen = target_labels, target_unseen
        self.selection_labels = selection_labels
        self.augment, self.augmentation = augment, augment
        self.drop_last, self.seed, self.blind = drop_last, seed, False
        self.views, self.unlabelled = 1, False
        self.resolved: dict[str, Any] = {}
        self._domains: dict[str, Mapping[str, Dataset[Any]]] = {}
        self._loaders: list[Loader] = []

    @property
    def schema(self) -> dict[str, Any]:
        """Describes x and y as plain data, from which models are built."""
        named = {"classes": list(self.class_names)} if self.class_names is not None else {"values": self.num_outputs}
        return {"x": dict(self.x_schema), "y": dict(self.y_schema) if self.y_schema is not None else named}

    def setup(self, stage: str) -> None:
        """Lets the model that is trained decide the arguments that are left open."""
        self.resolve(getattr(getattr(self.trainer, "lightning_module", None), "data_defaults", {}))

    def resolve(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Decides the arguments that are left open.

        Args:
            defaults: The values that the model prefers, by name.

        Returns:
            The values as decided, by name; for wrapped data nested as its `data`, {"data": {"init_args": ...}}.
        """
        found: dict[str, Any] = {}
        self.views, self.unlabelled = defaults.get("views", 1), defaults.get("unlabelled", False)
        if self.augment == "auto":
            wanted = defaults.get("augment", "light")
            self.augmentation = wanted if self.photos or self.views > 1 else "none"
            found["augment"] = self.augmentation
        if isinstance(inner := getattr(self, "data", None), TransferDataModule):
            found["data"] = {"init_args": inner.resolve(defaults)}
        if found != self.resolved:  # data sets made before used other values
            self.resolved = found
            self._domains.clear()
        return found

    def domains(self, split: str) -> Mapping[str, Dataset[Any]]:
        """Returns the data set of each domain that this split has.

        Args:
            split: "train", "val" or "test".

        Returns:
            Keys are "target" and "source", or, for several sources, "source/<name>" each.
        """
        raise NotImplementedError

    def split_domains(self, split: str) -> Mapping[str, Dataset[Any]]:
        """Returns the data sets of `domains`, the same objects each time."""
        if split not in self._domains:
            self._domains[split] = self.domains(split)
        return self._domains[split]

    def labels_hidden(self, split: str = "train") -> bool:
        """Returns whether the target's labels are hidden from training and model selection."""
        return self.would_hide_labels(self.split_domains(split))

    def would_hide_labels(self, domains: Collection[str]) -> bool:
        """Returns whether labels would be hidden if there were domains of these names."""
        beside = len(domains) > 1 if self.target_labels is None else not self.target_labels
        return "target" in domains and (beside or self.target_unseen)

    def wrapped(self, seed: int, blind: bool) -> None:
        """Takes over settings of a datamodule that builds its domains from this one; called before any split is made.

        Args:
            seed: The outer datamodule's seed.
            blind: Whether it hides the labels; splits then do not look at them.
        """
        self.seed, self.blind = seed, blind

    def stratifies(self, name: str, domains: Collection[str]) -> bool:
        """Returns whether the splits of the domain `name`, one of `domains`, may look at its labels."""
        return not self.blind and (name != "target" or not self.would_hide_labels(domains))

    def has_source(self) -> bool:
        """Returns whether there is a source to validate on."""
        return any(name != "target" for name in self.split_domains("val"))

    def _evaluation_domain(self, split: str) -> tuple[str, Dataset[Any]]:
        """Returns the domain to evaluate: the target, but for model selection only if its labels are visible."""
        domains = dict(self.split_domains(split))
        target = domains.pop("target", None)
        if target is not None and (not domains or split == "test" or not self.labels_hidden(split)):
            return "target", target
        sources = list(domains.values())
        return "source", sources[0] if len(sources) == 1 else Joined(sources)

    def train_dataloader(self) -> CombinedLoader:
        """Loads all domains side by side; the longest one sets the epoch, shorter ones start over in a new order."""
        domains = {
            name: d for name, d in self.split_domains("train").items() if name != "target" or not self.target_unseen
        }
        hidden = self.labels_hidden()
        if not domains:
            raise DataError("target_unseen: there is no source to train on; give --data.source")
        if self.labelled is not None and "target" not in domains:
            raise DataError("labelled: it shows labels of a target, and there is none; give --data.target")
        if hidden and self.shots_per_class:
            raise DataError(
                "shots_per_class: it picks target samples by their labels, which are hidden beside a source; "
                "pass --data.target_labels true"
            )
        if self.augmentation == "auto":
            self.resolve({})
        if self.augment == "auto" and (self.photos or self.views > 1) and self.trainer:  # only while training
            whole = "views are compared" if self.views > 1 else "photos train the whole backbone"
            why = whole if self.augmentation != "none" else "some of the backbone is frozen"
            log.info("augment: %s, the default if %s; --data.augment changes it", self.augmentation, why)
        views, loaders = {}, {}
        for name, dataset in domains.items():
            rows: Sequence[int] = range(len(dataset))  # type: ignore[arg-type]
            if name == "target" and self.shots_per_class:
                rows = few_shots(dataset, self.shots_per_class, self.class_names, self.seed)
            if name == "target" and self.labelled is not None and not self.unlabelled:
                shown = some_of_each(dataset, self.labelled, self.seed)
                views["target/labelled"] = self._augmented(dataset, shown)
                rows = sorted(set(rows) - set(shown))
                if not rows:
                    raise DataError(f"labelled: none of the target's {len(shown)} training samples is left unlabelled")
            without = self.unlabelled or (name == "target" and (hidden or self.labelled is not None))
            views[name] = self._augmented(dataset, rows, "none" if without else "y")
        shares = {name: self.unlabelled_ratio if name == "target" else 1 for name in views}
        longest = max(math.ceil(len(view) / shares[name]) for name, view in views.items())
        for name, view in views.items():
            samples, size = longest * shares[name], self.batch_size * shares[name]
            sampler = EpochSampler(view, samples, size, self.seed, name, not self.drop_last)
            # the CombinedLoader names the batches
            loaders[name] = self._loader(view, sampler.batch_size, sampler, name, named=False, drop_last=self.drop_last)
        return CombinedLoader(loaders, "min_size")  # equal, except for a last batch of one sample

    def labelled_dataloader(self) -> Loader:
        """Loads the target's labelled training samples (without a target, the source's), in order, not augmented.

        Raises:
            DataError: The target's labels are hidden from training, or there are several sources and no target.
        """
        loaders: dict[str, Loader] = cast(Any, self.train_dataloader().iterables)
        shown = {name: loader for name, loader in loaders.items() if loader.dataset.label == "y"}
        if "target" in loaders:
            shown = {name: loader for name, loader in shown.items() if name.startswith("target")}
        if len(shown) != 1:
            raise DataError(
                "target: labels of its training samples are needed, but they are hidden or there is no target; leave "
                "--data.source out, or show some with --data.labelled N or all with --data.target_labels true"
            )
        ((name, loader),) = shown.items()
        view = IndexedSubset(loader.dataset.dataset, loader.dataset.rows)
        found = self._loader(view, loader.batch_size or 1, EvalSampler(view), name)
        found.purpose = "train"
        return found

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Loads the labelled validation split, and, if the target's labels are hidden, its samples without labels."""
        name, dataset = self._evaluation_domain("val")
        hidden = self.labels_hidden("val")
        loaders: list[DataLoader[Any]] = []
        if not (hidden and name == "target"):
            loaders.append(self._rows(dataset, name, "y", "val", self.views))
        if hidden:
            seen: list[Dataset[Any]] = []
            for split in ("val", "test"):
                target = self.split_domains(split)["target"]
                if not any(target is other for other in seen):
                    loaders.append(self._rows(target, "target", "none", f"target {split}", self.views))
                    seen.append(target)
        return loaders[0] if len(loaders) == 1 else loaders

    def tests_on_validation(self) -> bool:
        """Returns whether the target's test split is its validation split."""
        return self.split_domains("test").get("target") is self.split_domains("val").get("target")

    def open_labels(self) -> tuple[list[int], np.ndarray[Any, Any]]:
        """Returns the rows of the target's validation split whose labels `selection_labels` shows, and these labels."""
        dataset = self.split_domains("val")["target"]
        if self.selection_labels is None:
            return [], np.zeros(0)
        rows = few_shots(dataset, self.selection_labels, self.class_names, self.seed, "selection_labels")
        return rows, cast(Any, labels_of(dataset))[rows]

    def labels(self, split: str) -> np.ndarray[Any, Any] | None:
        """Returns the target's labels, for the report after `tl test`; None if it has none."""
        return labels_of(self.split_domains(split)["target"])

    def test_dataloader(self) -> DataLoader[Any]:
        """Loads the target's test split (without a target, the source's)."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Loads the samples of `test_dataloader`, without labels; `index` counts the rows of `ids`."""
        return self._evaluation("test", label="none")

    def ids(self) -> list[str]:
        """Returns the name of each row of `predict_dataloader`."""
        _, dataset = self._evaluation_domain("test")
        return ids_of(dataset)

    def all_dataloaders(self) -> dict[tuple[str, str], DataLoader[Any]]:
        """Returns unlabelled, unaugmented loaders of each (domain, split); a split with two names appears once."""
        found: dict[tuple[str, str], DataLoader[Any]] = {}
        seen: list[Dataset[Any]] = []
        for split in SPLITS:
            for domain, dataset in self.split_domains(split).items():
                if not any(dataset is other for other in seen):
                    seen.append(dataset)
                    found[domain, split] = self._rows(dataset, domain, "none", split)
        return found

    def ids_and_labels(self, domain: str, split: str) -> tuple[Sequence[str], Sequence[Any]]:
        """Returns the ids and labels of a split's rows; classes by name, "" without labels."""
        dataset = self.split_domains(split)[domain]
        return ids_of(dataset), named_labels(dataset, self.class_names)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Skips the transfer on a CPU."""
        return batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _evaluation(self, split: str, label: str = "y") -> DataLoader[Any]:
        name, dataset = self._evaluation_domain(split)
        return self._rows(dataset, name, label, split)

    def _augmented(self, dataset: Dataset[Any], rows: Sequence[int], label: str = "y") -> IndexedSubset:
        """Returns rows with training augmentation."""
        augment = transforms_of(self.augmentation, dataset, type(self).__name__, self.photos)
        return views_of(dataset, rows, augment, label, self.views)

    def _rows(self, dataset: Dataset[Any], domain: str, label: str, purpose: str, views: int = 1) -> DataLoader[Any]:
        rows = range(len(dataset))  # type: ignore[arg-type]
        label = "none" if self.unlabelled and bool(getattr(dataset, "unlabelled", "")) else label
        view = IndexedSubset(dataset, rows, label=label) if views == 1 else self._augmented(dataset, rows, label)
        sampler = EvalSampler(view)
        size = even_batch_size(len(view), sampler.num_replicas, self.batch_size)
        loader = self._loader(view, size, sampler, domain)
        loader.purpose = purpose
        return loader

    def _loader(
        self, view: IndexedSubset, size: int, sampler: Any, domain: str, named: bool = True, drop_last: bool = False
    ) -> Loader:
        model = getattr(self.trainer, "lightning_module", None)
        own = self.collate or getattr(model, "collate", None) or collate
        loader = Loader(
            view,
            batch_size=size,
            sampler=sampler,
            collate_fn=Named(own, domain if named else None),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            drop_last=drop_last,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # its own, so that making an iterator does not change the global random state
        )
        loader.domain = domain
        self._loaders.append(loader)
        return loader

    def teardown(self, stage: str) -> None:
        """Stops the loaders' workers."""
        while self._loaders:
            self._loaders.pop().stop()

    def on_exception(self, exception: BaseException) -> None:
        """Stops the loaders' workers when a run ends early."""
        self.teardown("")
