"""A training step on one page: a batch goes through backbone, head and loss terms.

    batch {"source": Batch(x, y, index), "target": Batch(x, None, index)}
      -> transform_batch    a method may replace the batch
      -> forward_domains    backbone (-> bottleneck) -> features -> head -> output: one DomainOutput per side
      -> reweight           how much each sample counts
      -> terms              the task's loss on every labelled output, + weight * method(source output, target output)
      -> sum

x, y, features and outputs are trees of samples (batch/samples.py); nothing here depends on what is in them. A target
alone is fine-tuning; labelled source and target are joint training, L_S + target_weight * L_T; a labelled source beside
an unlabelled target is adaptation. Which one it is follows from the batch alone; there is no flag.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import reduce
from typing import Any, Literal

import torch
from jsonargparse import lazy_instance  # type: ignore[attr-defined]
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tl_modules.backbones.base import Backbone
from tl_modules.batch import samples
from tl_modules.batch.cached import CachedActivations, align_cached, pass_together
from tl_modules.batch.compat import QuickNames, attached
from tl_modules.batch.current_domain import passing
from tl_modules.batch.full_pass import full_pass, whole_domains
from tl_modules.batch.output import DomainOutput, by_domain, check_sources, full_precision, joined, no_stats_update
from tl_modules.batch.samples import Batch
from tl_modules.checkpoints import contents
from tl_modules.errors import UserError
from tl_modules.finetuning.base import FineTuning
from tl_modules.finetuning.freezing import FullFineTuning
from tl_modules.finetuning.head_start import start_head
from tl_modules.finetuning.optimizer import WarmupCosine
from tl_modules.finetuning.staged import StagedModule
from tl_modules.heads import Bottleneck, Head, LinearHead
from tl_modules.methods.base import Method, attach_methods, check_methods, check_reach, named
from tl_modules.methods.schedules import LossWeight, current_weight
from tl_modules.methods.terms import LossMeans

# our hook returns the batches of our datamodules unchanged, so Lightning's warning does not apply
warnings.filterwarnings("ignore", ".*overridden `on_before_batch_transfer` in `LightningModule`")
HeadCallable = Callable[[Any, int], Head]
Domains = Mapping[str, Batch]


class TransferModule(QuickNames, StagedModule):
    """A pretrained backbone and a task head, trained according to the fine-tuning strategy and the methods.

    A task subclasses this and implements `Task`. Backbone, head, strategy and methods are composed.

    Args:
        backbone: Maps raw samples to features.
        schema: Describes inputs and labels as plain data, e.g. {"x": {"image": {}}, "y": {"classes": ["cat", "dog"]}};
            `tl fit` takes it from the data. An int is the number of outputs; inputs and classes are then unknown.
        head: Class or function of (in_features, out_features).
        finetuning: Which stages train when, and how fast.
        methods: Further terms of the loss.
        optimizer: Class or function of the parameter groups; its learning rate is that of the head.
        lr_scheduler: Class or function of the optimizer; stepped each epoch (WarmupCosine, OneCycleLR and CyclicLR:
            each step). None: constant learning rates.
        target_weight: lambda in L_S + lambda L_T, if both domains are labelled; a number or a `WeightSchedule`.
        source_weight: The weight of L_S; with 0 the source's labels are not trained on.
        bottleneck: Width (often 256) of a trainable layer between the backbone's pooled features and the head: Linear,
            BatchNorm, ReLU. Head and methods get its output, and can adapt it even if the backbone is frozen.
        checkpoint_weights: "all", or "trainable": checkpoints then leave out the parameters that never train, and
            loading one needs the backbone's pretrained weights again (a fingerprint checks that they are the same).
    """

    backbone: Backbone

    def __init__(
        self,
        backbone: Backbone,
        schema: dict | int,  # type: ignore[type-arg]  # the parser would re-read texts in a dict[str, Any]
        head: HeadCallable = LinearHead,
        finetuning: FineTuning = lazy_instance(FullFineTuning),  # noqa: B008 - plain data until it is built
        methods: list[Method] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=1e-2),
        lr_scheduler: LRSchedulerCallable | None = WarmupCosine,
        target_weight: LossWeight = 1.0,
        source_weight: LossWeight = 1.0,
        bottleneck: int | None = None,
        checkpoint_weights: Literal["all", "trainable"] = "all",
    ) -> None:
        super().__init__()
        self.schema = {"y": {"outputs": schema}} if isinstance(schema, int) else dict(schema)
        backbone.bind_schema(self.schema.get("x") or {})
        self.backbone = backbone
        if bottleneck is not None and not self.uses_pooled_features:
            raise UserError(f"bottleneck: {type(self).__name__} has no vector for each sample; leave it out")
        self.bottleneck = nn.Identity() if bottleneck is None else Bottleneck(backbone.width, bottleneck)
        features = self.width if self.uses_pooled_features else backbone.out_features
        self.head: nn.Module = head(features, self.num_outputs)
        self.finetuning = finetuning
        self.num_stages = len(self.stages())
        self.trainable = range(self.num_stages)
        self.methods = nn.ModuleList(methods or [])
        self.backbone_lr = finetuning.relative_lr(backbone.random)
        self.reached: set[str] = set()  # methods whose gradient has reached a trainable parameter
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.checkpoint_weights = checkpoint_weights
        self.left_out: str | None = None  # fingerprint of what checkpoints leave out, once one is written
        self.task_weight = {"source": source_weight, "target": target_weight}
        self.build_metrics()
        self.terms = LossMeans()
        self.head_transferred = contents.transfer_head(self)
        finetuning.extend(self)
        attach_methods(self)
        finetuning.prepare(self)

    # One training step

    def encode(self, x: Any) -> Any:
        """Maps prepared inputs, or cached activations in their place, to the head's input, in float32."""
        if isinstance(x, CachedActivations):
            features = x.features()
        else:
            features = self.backbone(x)
            features = self.backbone.pooled_features(features) if self.uses_pooled_features else features
        features = self.bottleneck(features)
        return samples.to_float32(features) if torch.is_autocast_enabled(self.device.type) else features

    def forward(self, x: Any) -> Any:
        """Maps prepared inputs (B, ...) to outputs (B, num_outputs)."""
        features = self.encode(x)
        with full_precision(self.device):
            return self.decode(features)

    def forward_domains(self, batch: Domains) -> dict[str, DomainOutput]:
        """Runs all domains as one batch; returns one output for the source(s) and one for the target."""
        names, parts = list(batch), [samples.as_batch(part) for part in batch.values()]
        xs = align_cached(self.backbone.align([part.x for part in parts]))
        parts = [type(part)(x, *part[1:]) for part, x in zip(parts, xs, strict=True)]
        owners = [name.partition("/")[0] for name in names]
        rows = list(zip(owners, map(samples.count, xs), strict=True))
        apart = any(method.separate_domains for _, method in self.named_methods())
        if pass_together(xs, self.backbone.align) and not apart:
            with passing(rows):
                features = samples.split(self.encode(samples.concat(xs)), [count for _, count in rows])
        else:  # inputs of different shapes run one by one
            if any(method.needs_raw_input for _, method in self.named_methods()):
                check_sources(names, xs)
            features = []
            for x, row in zip(xs, rows, strict=True):
                with passing([row]):
                    features.append(self.encode(x))
        of = {owner: [i for i, name in enumerate(owners) if name == owner] for owner in owners}
        own = [samples.concat([features[i] for i in indices]) for indices in of.values()]
        with full_precision(self.device):
            outputs = samples.split(self.decode(samples.concat(own)), list(map(samples.count, own)))
        return {
            owner: joined(self, owner, [parts[i] for i in indices], of_owner, output)
            for (owner, indices), of_owner, output in zip(of.items(), own, outputs, strict=True)
        }

    def forward_extra(self, x: Any, domain: str = "target") -> DomainOutput:
        """Runs other inputs of one domain, e.g. augmented or mixed ones, in the run's precision.

        In training it does not update running statistics: BatchNorm's should come from the unmodified data.
        """
        precision = self.trainer.precision_plugin.forward_context() if attached(self) else nullcontext()
        with precision, no_stats_update(self) if self.training else nullcontext():
            return self.forward_domains({domain: Batch(x)})[domain]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Names the domains of batches that do not come from our loaders."""
        return by_domain(batch, Tensor)

    def training_step(self, batch: Domains, batch_idx: int) -> Tensor:
        """Computes the sum of the task's and the methods' terms."""
        methods = self.named_methods()
        batch = {name: samples.as_batch(part) for name, part in batch.items()}
        for _, method in methods:
            batch = method.transform_batch(self, batch)
        outputs = self.forward_domains(batch)
        source, target = outputs.get("source"), outputs.get("target")
        with full_precision(self.device):
            for _, method in methods:
                method.reweight(self, source, target)
            terms = {}
            for domain, output in outputs.items():
                labelled = output.with_labels
                if labelled is not None and self.task_weight[domain] != 0:
                    terms[f"task/{domain}"] = current_weight(self.task_weight[domain], self) * labelled.mean_loss
            for name, method in methods:
                term = method(self, source, target)
                if term is not None:
                    check_reach(self, name, method, term)
                    terms[name] = current_weight(method.weight, self) * term
        if not terms:
            raise UserError(
                "source_weight, target_weight: nothing is left of the loss: the labelled domains have weight 0, "
                "and no method adds a term"
            )
        total = reduce(torch.add, terms.values())
        self.terms.add({"loss": total, **terms}, max(map(len, outputs.values())))
        return total

    def named_methods(self) -> list[tuple[str, Any]]:
        """Returns the methods with the names under which they are logged."""
        return named(self.methods)

    def on_train_start(self) -> None:
        """Checks, before the first step, everything that would otherwise fail later.

        Raises:
            UserError: A method lacks a domain, there is nothing to learn from, or the strategy cannot train.
        """
        domains: dict[str, Any] = by_domain(self.trainer.train_dataloader, DataLoader)
        labels = [getattr(getattr(loader, "dataset", None), "label", "y") for loader in domains.values()]
        self.adapts = len(domains) > 1 or "none" in labels
        self.open_stages()  # a run resumed mid-epoch skips on_train_epoch_start
        check_methods(self, domains, labels)
        self.finetuning.check(self, domains)
        super().on_train_start()
        start_head(self, domains)

    def on_train_epoch_start(self) -> None:
        """Unfreezes the stages of this epoch, and runs the full passes that methods ask for."""
        self.terms = LossMeans()
        super().on_train_epoch_start()
        domains = whole_domains(by_domain(self.trainer.train_dataloader, DataLoader))
        for _, method in self.named_methods():
            for domain, loaders in domains.items():
                if domain.partition("/")[0] in method.full_pass:
                    method.on_full_pass(self, domain, full_pass(self, loaders))

    def on_train_batch_end(self, outputs: Any, batch: Domains, batch_idx: int) -> None:
        """Logs the epoch's mean of each term, before the epoch's last validation."""
        if self.trainer.is_last_batch or self.trainer.global_step == self.trainer.max_steps:
            means = {f"train/{name}": mean for name, mean in self.terms.means().items()}
            self.log_dict(means, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds a description of the task, and, if `save` says so, leaves out what never trains."""
        contents.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores left-out weights; rescales saved learning rates if the configured one has changed."""
        contents.restore(self, checkpoint)
