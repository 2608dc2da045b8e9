"""Adapts a trained model to the unlabelled test inputs, in `tl test` and `tl predict`.

    tl test --run DIR --trainer.callbacks+=TENT     metrics.json gets test/tent/accuracy beside test/accuracy

    AdaBN   before the first batch    BatchNorm's statistics become those of the test inputs
    TENT    after each batch          BatchNorm's scales and shifts are trained for more confident predictions
    T3A     with each batch           the head's weights become means of the most confident features

A copy is adapted; the module is restored afterwards. Labels are never used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tl_modules.backbones.base import Backbone
from tl_modules.batch import samples
from tl_modules.batch.compat import BatchNorm
from tl_modules.errors import UserError
from tl_modules.evaluation.gather import eval_dataloaders
from tl_modules.methods.functional import entropy, soft_cross_entropy
from tl_modules.module import Domains, TransferModule

__all__ = ["T3A", "TENT", "AdaBN", "TestTimeAdaptation"]

Loaders = list[tuple[Any, list[list[int]]]]
BATCH = 64  # statistics of smaller batches are too noisy


class TestTimeAdaptation(Callback):
    """Replaces parts of the module during a test or prediction; a subclass implements `check` and `begin`.

    Attributes:
        moves_backbone: Whether features change: then the backbone is a copy that may be modified, and nothing is
            cached.
        needs_classes: Whether it works on class probabilities.
    """

    __test__ = False  # keeps pytest from collecting this class as a test
    moves_backbone: ClassVar[bool] = True
    needs_classes: ClassVar[bool] = True
    original: tuple[Backbone, nn.Module] | None = None

    @property
    def name(self) -> str:
        """The prefix of its metrics, e.g. tent."""
        return type(self).__name__.lower()

    def check(self, module: TransferModule) -> None:
        """Raises a UserError if the module cannot be adapted."""

    def begin(self, trainer: Trainer, module: TransferModule, loaders: Loaders) -> None:
        """Changes the module's parts.

        Args:
            trainer: The run's trainer.
            module: The module; its backbone is a copy if `moves_backbone`; its head is the original, and may be
                replaced.
            loaders: The test loaders, each with the indices of its batches.
        """
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Rejects what cannot be adapted.

        Raises:
            UserError: Another command; two adaptations; or a task, backbone or head that it does not support.
        """
        name = type(self).__name__
        if stage not in ("test", "predict") or not isinstance(pl_module, TransferModule):
            raise UserError(f"callbacks: {name} works only in `tl test` and `tl predict`; leave it out here")
        others = [c for c in cast(Any, trainer).callbacks if isinstance(c, TestTimeAdaptation) and c is not self]
        if others:
            raise UserError(f"callbacks: {name} and {type(others[0]).__name__} both adapt the model; use one")
        if self.needs_classes and not pl_module.is_classification:
            raise UserError(f"callbacks: {name} works on class probabilities, which {type(pl_module).__name__} lacks")
        self.check(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the module's parts, and adapts copies in their place."""
        assert isinstance(pl_module, TransferModule)
        self.original = pl_module.backbone, pl_module.head
        if self.moves_backbone:
            with torch.inference_mode(False):  # tensors made in inference mode cannot be trained
                pl_module.backbone = copy.deepcopy(pl_module.backbone)
        testing = trainer.state.fn == "test"
        counts = trainer.num_test_batches if testing else trainer.num_predict_batches
        loaders = eval_dataloaders(trainer)
        batches = [list(islice(e.batch_sampler, int(count))) for e, count in zip(loaders, counts, strict=True)]
        self.begin(trainer, pl_module, list(zip(loaders, batches, strict=True)))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the module's parts."""
        if self.original is not None:
            module = cast(TransferModule, pl_module)
            module.backbone, module.head = self.original
            self.original = None

    on_predict_start = on_test_start
    on_predict_end = on_test_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restores them also if the test ends early."""
        self.on_test_end(trainer, pl_module)


class AdaBN(TestTimeAdaptation):
    """Recomputes BatchNorm's running statistics on the test inputs (Li et al., arXiv 1603.04779).

    One pass before the first batch: the mean over batches of each layer's batch statistics, with everything else in
    eval mode. The data are read in a fixed random order, since statistics of batches with a single class would be
    biased; with several processes the mean is over all of them.
    """

    needs_classes = False

    def check(self, module: TransferModule) -> None:
        """Checks that there is a BatchNorm layer.

        Raises:
            UserError: There is none.
        """
        _batch_norms(module, self)

    def begin(self, trainer: Trainer, module: TransferModule, loaders: Loaders) -> None:
        """Runs the pass."""
        layers = [layer for layer in _batch_norms(module, self) if layer.running_mean is not None]
        with taking_statistics(layers):
            for loader, batches in loaders:
                for batch in _mixed(loader, batches):
                    ((domain, part),) = module.on_before_batch_transfer(batch, 0).items()
                    x = samples.move(part.x, module.device)
                    module.forward_extra(trainer.precision_plugin.convert_input(x), domain)
        for layer in layers:
            for statistic in (layer.running_mean, layer.running_var):
                assert statistic is not None
                statistic.copy_(cast(Tensor, trainer.strategy.reduce(statistic, reduce_op="mean")))


class TENT(TestTimeAdaptation):
    """Trains BatchNorm's affine parameters online by the entropy of the predictions (Wang et al., ICLR 2021).

    Each batch is normalised with its own statistics and predicted, and then updates the parameters for the next one by
    `mean H(p)`. As in the authors' code, of several steps on a batch the last one comes after its predictions.

    The test data is not shuffled. If files are sorted by class, a batch has a single class and its statistics are those
    of that class; TENT then fails, and often ends below the original model. AdaBN and T3A depend less on the order.
    With several processes each one adapts to its own share of the data.

    Args:
        lr: Learning rate of Adam.
        steps: Steps on each batch.
    """

    def __init__(self, lr: float = 1e-3, steps: int = 1) -> None:
        if lr <= 0:
            raise UserError(f"lr: {lr} must be above 0")
        if steps < 1:
            raise UserError(f"steps: {steps} must be at least 1")
        self.lr, self.steps = lr, steps

    def check(self, module: TransferModule) -> None:
        """Checks that there is a BatchNorm layer with affine parameters.

        Raises:
            UserError: There is none.
        """
        if not any(layer.affine for layer in _batch_norms(module, self)):
            raise UserError("callbacks: TENT trains BatchNorm's affine parameters, but the backbone's layers have none")

    def begin(self, trainer: Trainer, module: TransferModule, loaders: Loaders) -> None:
        """Switches to batch statistics; builds the optimizer.

        Raises:
            UserError: A batch of one has no statistics.
        """
        sizes = [len(batch) for _, batches in loaders for batch in batches]
        if min(sizes) == 1:
            raise UserError(
                f"batch_size: {sum(sizes)} test samples in batches of {max(sizes)} leave a batch of one, whose "
                "statistics TENT cannot use; choose another --data.batch_size"
            )
        module.backbone.requires_grad_(False)
        layers = _batch_norms(module, self)
        for layer in layers:
            layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
        self.learned = [p.requires_grad_() for layer in layers if layer.affine for p in (layer.weight, layer.bias)]
        self.optimizer = torch.optim.Adam(self.learned, self.lr)

    def update(self, module: TransferModule, batch: Domains) -> None:
        """Takes one step on a batch's inputs."""
        ((domain, part),) = batch.items()
        with torch.inference_mode(False), torch.enable_grad():
            x = samples.copied(part.x)  # the batch was made in inference mode
            output = module.forward_extra(x, domain).output
            loss = soft_cross_entropy(output, output.softmax(1)).mean()
            # not backward(), which would leave gradients in the head
            gradients = torch.autograd.grad(loss, self.learned, allow_unused=True)
            for parameter, gradient in zip(self.learned, gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Takes all steps except the last."""
        for _step in range(self.steps - 1):
            self.update(cast(TransferModule, pl_module), batch)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Takes the last step, which helps the next batch."""
        self.update(cast(TransferModule, pl_module), batch)

    on_predict_batch_start = on_test_batch_start
    on_predict_batch_end = on_test_batch_end


class T3A(TestTimeAdaptation):
    """Test-time template adjuster: prototypes classify instead of a linear layer (Iwasawa and Matsuo, NeurIPS 2021).

    The layer is the head or, for an `MLPHead`, its last layer; what comes before computes the features. Each class has
    a support set, which begins with its row of the layer's weights. A batch's features, scaled to length 1, join the
    sets of the classes that the layer predicts; of each set the `filter_k` with the lowest entropy are kept. The output
    of features z for class c is `<z, mean of set c, scaled to length 1>`, whose scale differs from the layer's logits:
    accuracy can be compared, loss and calibration cannot. With several processes each one adapts to its own share of
    the data.

    Args:
        filter_k: Number of supports kept per class.
    """

    moves_backbone = False

    def __init__(self, filter_k: int = 100) -> None:
        if filter_k < 1:
            raise UserError(f"filter_k: {filter_k} must be at least 1")
        self.filter_k = filter_k

    def check(self, module: TransferModule) -> None:
        """Checks that the head ends in a linear layer.

        Raises:
            UserError: It does not.
        """
        if not isinstance(_layers(module.head)[-1], nn.Linear):
            raise UserError(
                "callbacks: T3A needs a head that ends in a torch.nn.Linear, but this run's head "
                f"is a {type(module.head).__name__}; use AdaBN or TENT"
            )

    def begin(self, trainer: Trainer, module: TransferModule, loaders: Loaders) -> None:
        """Replaces the layer."""
        *before, last = _layers(module.head)
        module.head = nn.Sequential(*before, _Prototypes(cast(nn.Linear, last), self.filter_k))


def _layers(head: nn.Module) -> list[nn.Module]:
    return list(head) if isinstance(head, nn.Sequential) else [head]


class _Prototypes(nn.Module):
    """T3A's classifier; every pass adds supports."""

    def __init__(self, last: nn.Linear, filter_k: int) -> None:
        super().__init__()
        self.last, self.filter_k = last, filter_k
        weights = last.weight.detach()
        self.supports, self.classes = F.normalize(weights), torch.arange(len(weights), device=weights.device)
        self.entropies = entropy(last(weights).detach().softmax(1))

    def forward(self, features: Tensor) -> Tensor:
        """Maps (B, D) to (B, C)."""
        logits = self.last(features)
        self.supports = torch.cat([self.supports, F.normalize(features)])
        self.classes = torch.cat([self.classes, logits.argmax(1)])
        self.entropies = torch.cat([self.entropies, entropy(logits.softmax(1))])
        kept = torch.cat([self._surest(c) for c in range(logits.shape[1])])
        self.supports, self.classes, self.entropies = self.supports[kept], self.classes[kept], self.entropies[kept]
        members = F.one_hot(self.classes, logits.shape[1]).to(self.supports)
        return features @ F.normalize(members.T @ self.supports).T

    def _surest(self, c: int) -> Tensor:
        rows = (self.classes == c).nonzero().squeeze(1)
        return rows[self.entropies[rows].argsort(stable=True)[: self.filter_k]]


@contextmanager
def taking_statistics(layers: Sequence[BatchNorm]) -> Iterator[None]:
    """Recomputes running statistics of BatchNorm layers in this context: the mean over batches of batch statistics.

    The layers belong to a module in eval mode, and are in eval mode again on exit.
    """
    before = [{name: getattr(layer, name) for name in ("momentum", "p") if hasattr(layer, name)} for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # averages over all batches
        layer.train()
        cast(Any, layer).p = 0.0  # StochNorm would mix in the statistics that are being computed
    yield
    for layer, settings in zip(layers, before, strict=True):
        layer.eval()
        vars(layer).update(settings)


def _batch_norms(module: TransferModule, adaptation: TestTimeAdaptation) -> list[BatchNorm]:
    layers = [layer for layer in module.backbone.modules() if isinstance(layer, BatchNorm)]
    if not layers:
        name = type(adaptation).__name__
        raise UserError(f"callbacks: {name} adapts BatchNorm, but the backbone has none; use T3A")
    return layers


def _mixed(loader: Any, batches: list[list[int]]) -> DataLoader[Any]:
    """Loads the same rows in a fixed random order, in batches of nearly equal size."""
    rows = torch.tensor([row for batch in batches for row in batch])
    order = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    mixed = order.tensor_split(math.ceil(len(rows) / max(BATCH, len(batches[0]))))
    # not the loader itself, which the test may already be reading
    return DataLoader(
        loader.dataset,
        batch_sampler=[batch.tolist() for batch in mixed],
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator(),  # its own, so that the global random state does not change
    )
