"""The straight line: a batch goes through backbone, head and loss terms on this one page.

    batch {"source": Batch(x, y, index), "target": Batch(x, None, index)}
      -> transform_batch    a method may put another batch in its place
      -> forward_domains    backbone -> features -> head -> output: a DomainOutput of the source(s) and of the target
      -> reweight           how much each sample counts
      -> terms              the task's loss on every labelled output, + weight * method(source output, target output)
      -> sum

x, y, features and outputs are trees of samples (batch/samples.py); nothing here knows what is in them. A plain target
is fine-tuning; labelled source and target are joint training, L_S + target_weight * L_T; a labelled source beside an
unlabelled target is adaptation. The batch alone says which it is; there is no switch.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any, Literal

import torch
from jsonargparse import lazy_instance  # type: ignore[attr-defined]
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from tl_modules.backbones.base import Backbone
from tl_modules.batch import samples
from tl_modules.batch.cached import CachedActivations, align_cached
from tl_modules.batch.compat import QuickNames, attached
from tl_modules.batch.current_domain import passing
from tl_modules.batch.full_pass import full_pass
from tl_modules.batch.output import DomainOutput, by_domain, check_sources, joined, statistics_kept
from tl_modules.batch.samples import Batch, Collate
from tl_modules.checkpoints import contents
from tl_modules.errors import UserError
from tl_modules.finetuning.base import FineTuning
from tl_modules.finetuning.freezing import Full
from tl_modules.finetuning.head_start import start_head
from tl_modules.finetuning.optimizer import WarmupCosine
from tl_modules.finetuning.staged import StagedModule
from tl_modules.heads import Head, LinearHead
from tl_modules.methods.base import Method, check_reach
from tl_modules.methods.schedules import Weight, at
from tl_modules.methods.terms import LossMean, Terms

# ours leaves the batches of a datamodule of ours as they are
warnings.filterwarnings("ignore", ".*overridden `on_before_batch_transfer` in `LightningModule`")
log = logging.getLogger(__name__)
HeadCallable = Callable[[Any, int], Head]
Domains = Mapping[str, Batch]


class TransferModule(QuickNames, StagedModule):
    """A pretrained backbone and a task head, trained as the fine-tuning strategy and the methods say.

    A task subclasses this and fills in the form of `Task`. Backbone, head, strategy and methods are composed.

    Args:
        backbone: Raw samples -> features.
        schema: What inputs and labels are, as plain data, e.g. {"x": {"image": {}}, "y": {"classes": ["cat", "dog"]}};
            `tl fit` takes it from the data. A number is that of the outputs, and says nothing else.
        head: Class or function of (in_features, out_features).
        finetuning: Which stages train when, and how fast.
        methods: Further terms of the loss.
        optimizer: Class or function of the parameter groups; its learning rate is the head's.
        lr_scheduler: Class or function of the optimizer; stepped each epoch (WarmupCosine, OneCycleLR and CyclicLR:
            each step). None: the learning rates stay as they are.
        target_weight: lambda in L_S + lambda L_T, where both domains are labelled, a number or a `Schedule`.
        source_weight: The weight of L_S; with 0 the source's labels train nothing.
        save: "all", or "trainable": checkpoints leave out the parameters that never train, and loading one needs the
            backbone's pretrained weights again (a fingerprint makes sure that they are the same).
    """

    backbone: Backbone

    def __init__(
        self,
        backbone: Backbone,
        schema: dict | int,  # type: ignore[type-arg]  # the parser would read the texts of a dict[str, Any] again
        head: HeadCallable = LinearHead,
        finetuning: FineTuning = lazy_instance(Full),  # noqa: B008 - plain data until it is built
        methods: list[Method] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=1e-2),
        lr_scheduler: LRSchedulerCallable | None = WarmupCosine,
        target_weight: Weight = 1.0,
        source_weight: Weight = 1.0,
        save: Literal["all", "trainable"] = "all",
    ) -> None:
        super().__init__()
        self.schema = {"y": {"outputs": schema}} if isinstance(schema, int) else dict(schema)
        backbone.bind_schema(self.schema.get("x") or {})
        self.backbone = backbone
        self.head: nn.Module = head(
            backbone.width if self.uses_pooled_features else backbone.out_features, self.num_outputs
        )
        self.finetuning = finetuning
        self.num_stages = len(self.stages())
        self.trainable = range(self.num_stages)
        self.methods = nn.ModuleList(methods or [])
        self.backbone_lr = finetuning.relative_lr(backbone.random)
        self.reached: set[str] = set()  # the methods whose gradient has been seen to come to something that trains
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.save = save
        self.left_out: str | None = None  # a fingerprint of what checkpoints leave out, once one is written
        self.task_weight = {"source": source_weight, "target": target_weight}
        self.val_metrics = self.metrics().clone(prefix="val/")
        self.test_metrics = self.metrics().clone(prefix="test/")
        self.val_loss, self.test_loss = LossMean(), LossMean()
        self.terms = Terms()
        self.head_transferred = contents.transfer_head(self)
        # what changes the backbone comes before what copies it
        for _, method in sorted(self.named_methods(), key=lambda named: not named[1].changes_backbone):
            if method.needs_classes and not self.is_classification:
                which, task = type(method).__name__, type(self).__name__
                raise UserError(f"methods: {which} works on class probabilities, which {task} lacks")
            method.attach(self)
        finetuning.prepare(self)

    # The straight line

    @property
    def collate(self) -> Collate:
        """What makes a `Batch` of raw samples in a loader's worker: the backbone's way for x, the task's for y."""
        return Collate(self.backbone.prepare, self.label)

    def encode(self, x: Any) -> Any:
        """Prepared inputs, or cached activations in their place -> what the head takes, in single precision."""
        if isinstance(x, CachedActivations):
            features = x.features()
        else:
            features = self.backbone(x)
            features = self.backbone.pooled_features(features) if self.uses_pooled_features else features
        return samples.to_float32(features) if torch.is_autocast_enabled(self.device.type) else features

    def forward(self, x: Any) -> Any:
        """Prepared inputs (B, ...) -> outputs (B, num_outputs)."""
        features = self.encode(x)
        with self._full_precision():
            return self.decode(features)

    def forward_domains(self, batch: Domains) -> dict[str, DomainOutput]:
        """Runs all domains as one batch; returns one output for the source(s) and one for the target."""
        names, parts = list(batch), [Batch(*part) for part in batch.values()]
        xs = align_cached(self.backbone.align([part.x for part in parts]))
        parts = [Batch(x, part.y, part.index) for part, x in zip(parts, xs, strict=True)]
        owners = [name.partition("/")[0] for name in names]
        rows = list(zip(owners, map(samples.count, xs), strict=True))
        if samples.alike(xs):
            with passing(rows):
                features = samples.split(self.encode(samples.concat(xs)), [count for _, count in rows])
        else:  # inputs that cannot be concatenated pass one after the other
            if any(method.reads_x for _, method in self.named_methods()):
                check_sources(names, xs)
            features = []
            for x, row in zip(xs, rows, strict=True):
                with passing([row]):
                    features.append(self.encode(x))
        of = {owner: [i for i, name in enumerate(owners) if name == owner] for owner in owners}
        whole = samples.concat([samples.concat([features[i] for i in places]) for places in of.values()])
        with self._full_precision():
            outputs = samples.split(self.decode(whole), [sum(rows[i][1] for i in places) for places in of.values()])
        found = {}
        for (owner, places), output in zip(of.items(), outputs, strict=True):
            own = [parts[i] for i in places], [features[i] for i in places]
            found[owner] = joined(self, owner, *own, output)
        return found

    def forward_extra(self, x: Any, domain: str = "target") -> DomainOutput:
        """Runs other inputs of one domain, e.g. augmented or mixed ones, in the run's precision.

        In training it updates no running statistics: BatchNorm predicts with those of the data as it is.
        """
        precision = self.trainer.precision_plugin.forward_context() if attached(self) else nullcontext()
        with precision, statistics_kept(self) if self.training else nullcontext():
            return self.forward_domains({domain: Batch(x)})[domain]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Names the domains of batches from loaders that are not ours."""
        return by_domain(batch, Tensor)

    def training_step(self, batch: Domains, batch_idx: int) -> Tensor:
        """Computes the sum of the task's and the methods' terms."""
        methods = self.named_methods()
        batch = {name: Batch(*part) for name, part in batch.items()}
        for _, method in methods:
            batch = method.transform_batch(self, batch)
        outputs = self.forward_domains(batch)
        source, target = outputs.get("source"), outputs.get("target")
        with self._full_precision():
            for _, method in methods:
                method.reweight(self, source, target)
            terms = {}
            for domain, output in outputs.items():
                labelled = output.with_labels
                if labelled is not None and self.task_weight[domain] != 0:
                    terms[f"task/{domain}"] = at(self.task_weight[domain], self) * labelled.mean_loss
            for name, method in methods:
                term = method(self, source, target)
                if term is not None:
                    check_reach(self, name, method, term)
                    terms[name] = at(method.weight, self) * term
        if not terms:
            raise UserError(
                "source_weight, target_weight: nothing is left of the loss, since the labelled domains have weight 0 "
                "and no method adds a term"
            )
        total = reduce(torch.add, terms.values())
        self.terms.add({"loss": total, **terms}, max(map(len, outputs.values())))
        return total

    def _full_precision(self) -> AbstractContextManager[Any]:
        """Head, losses and methods run in float32: autocast ends at the features."""
        mixed = torch.is_autocast_enabled(self.device.type)
        return torch.autocast(self.device.type, enabled=False) if mixed else nullcontext()

    def named_methods(self) -> list[tuple[str, Any]]:
        """Returns the methods with the names under which they are logged, e.g. l2sp; a second one is l2sp_2."""
        seen: Counter[str] = Counter()
        named = []
        for method in self.methods:
            name = type(method).__name__.lower()
            seen[name] += 1
            named.append((name if seen[name] == 1 else f"{name}_{seen[name]}", method))
        return named

    def on_train_start(self) -> None:
        """Checks before the first step everything that would otherwise fail later.

        Raises:
            UserError: A method lacks a domain, there is nothing to learn from, or the strategy cannot train.
        """
        domains: dict[str, Any] = by_domain(self.trainer.train_dataloader, DataLoader)
        labels = [getattr(getattr(loader, "dataset", None), "label", "y") for loader in domains.values()]
        self.adapts = len(domains) > 1 or "none" in labels
        self.open_stages()  # a run that goes on within an epoch does not start it
        for _, method in self.named_methods():
            method.check(self, list(domains))
        if set(labels) == {"none"} and not self.methods:
            raise UserError(
                "methods: the training data has no labels and there is no method, so there is nothing to learn from; "
                "give one, e.g. --model.methods+=SHOT, or open the labels by --data.target_labels true"
            )
        self.finetuning.check(self, domains)
        super().on_train_start()
        start_head(self, domains)

    def on_train_epoch_start(self) -> None:
        """Opens what this epoch opens, and gives the methods that ask for it a pass over a domain."""
        self.terms = Terms()
        super().on_train_epoch_start()
        for _, method in self.named_methods():
            for name, loader in by_domain(self.trainer.train_dataloader, DataLoader).items():
                if name.partition("/")[0] in method.full_pass:
                    method.on_full_pass(self, name, full_pass(self, name, loader))

    def on_train_batch_end(self, outputs: Any, batch: Domains, batch_idx: int) -> None:
        """Logs the epoch's mean of each term, before the validation that ends it."""
        if self.trainer.is_last_batch or self.trainer.global_step == self.trainer.max_steps:
            means = {f"train/{name}": mean for name, mean in self.terms.means().items()}
            self.log_dict(means, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    # Evaluation

    def validation_step(self, batch: Domains, batch_idx: int, dataloader_idx: int = 0) -> dict[str, DomainOutput]:
        """Updates loss and metrics where there are labels; returns the outputs, also of what has none."""
        return self._evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: Domains, batch_idx: int, dataloader_idx: int = 0) -> dict[str, DomainOutput]:
        """Updates loss and metrics of the test split."""
        return self._evaluate(batch, "test", dataloader_idx)

    def predict_step(self, batch: Domains, batch_idx: int, dataloader_idx: int = 0) -> tuple[Any, Tensor | None]:
        """Returns the predictions and the samples' numbers."""
        (output,) = self.forward_domains(batch).values()
        return output.prediction, output.index

    def _evaluate(self, batch: Domains, split: str, number: int) -> dict[str, DomainOutput]:
        """Loss and metrics of a batch of a split; those of a second labelled loader end in /dataloader_idx_1."""
        ((domain, output),) = self.forward_domains(batch).items()
        if output.y is None:
            return {domain: output}
        of_metrics, of_loss = (f"{split}_{what}{f'_{number}' if number else ''}" for what in ("metrics", "loss"))
        if not hasattr(self, of_loss):
            setattr(self, of_metrics, getattr(self, f"{split}_metrics").clone().to(self.device))
            setattr(self, of_loss, LossMean().to(self.device))
        metrics: MetricCollection = getattr(self, of_metrics)
        self.update_metrics(metrics, output.prediction, output.y)
        # not sync_dist: over ranks of uneven size it divides by a batch size rounded down (Lightning issue 21859)
        getattr(self, of_loss).update(output.loss, output.weight)
        measures = {of_loss: getattr(self, of_loss)}
        measures |= {f"{of_metrics}.{key}": m for key, m in metrics.items(keep_base=True, copy_state=False)}
        for attribute, measure in measures.items():
            name = f"{split}/{attribute.rpartition('.')[2] if '.' in attribute else 'loss'}"
            name += f"/dataloader_idx_{number}" if number else ""
            # with its attribute, which Lightning would look for once only
            self.log(name, measure, metric_attribute=attribute, batch_size=len(output), add_dataloader_idx=False)
        return {domain: output}

    def on_validation_epoch_end(self) -> None:
        """Stops at a validation loss that is not finite.

        Raises:
            UserError: It is nan or infinite.
        """
        self._check_finite(self.val_loss, "val/loss")

    def on_test_epoch_end(self) -> None:
        """Stops at a test loss that is not finite.

        Raises:
            UserError: It is nan or infinite.
        """
        self._check_finite(self.test_loss, "test/loss")

    def _check_finite(self, mean: LossMean, name: str) -> None:
        if mean.update_called and not mean.compute().isfinite():
            when = f"epoch {self.current_epoch}: " if self.trainer.state.fn == "fit" else ""
            raise UserError(
                f"{when}{name} is not finite: the outputs of some sample are nan or infinite; lower the learning rate, "
                "pass --trainer.gradient_clip_val 1 or --trainer.precision 32-true"
            )

    # Checkpoints

    def task_description(self) -> dict[str, Any]:
        """Returns the task and its labels, as plain data."""
        return {"task": type(self).__name__, "class_names": self.class_names, "num_outputs": self.num_outputs}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the task is, and leaves out what never trains if `save` says so."""
        contents.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores left-out weights; lets a learning rate given now win, at the schedule's present fraction of it."""
        contents.restore(self, checkpoint)
