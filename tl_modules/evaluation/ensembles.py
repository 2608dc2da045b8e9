"""Several predictions per sample in `tl test` and `tl predict`: their mean, and their disagreement.

    tl predict --run A --run B --run C                      a deep ensemble (Lakshminarayanan et al., NeurIPS 2017)
    tl predict --run A --trainer.callbacks+=MCDropout       one network with dropout (Gal and Ghahramani, ICML 2016)

For classes the probabilities are averaged, for values the outputs. predictions.csv gets columns of uncertainty: for
classes, in nats, `entropy`, H(mean p), and its part due to disagreement, `mutual_information`, H(mean p) - mean H(p);
for values, in their unit, the standard deviation `std`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from tl_modules.batch.output import DomainOutput
from tl_modules.errors import UserError
from tl_modules.evaluation.test_time import Loaders, TestTimeAdaptation
from tl_modules.methods.functional import entropy
from tl_modules.module import Domains, TransferModule

__all__ = ["DeepEnsemble", "Ensemble", "MCDropout"]

Forward = Callable[[Domains], dict[str, DomainOutput]]
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Ensemble(TestTimeAdaptation):
    """Averages several passes of a batch; a subclass implements `members`.

    Attributes:
        opinions: The outputs of T passes for the last batch: probabilities (T, B, C), or outputs (T, B, K).
    """

    needs_classes = False
    opinions: Tensor

    def members(self, module: TransferModule, forward: Forward) -> Iterator[Forward]:
        """Yields one function per member, which passes a batch.

        Args:
            module: The run's module.
            forward: Its own forward pass.
        """
        raise NotImplementedError

    def check(self, module: TransferModule) -> None:
        """Checks that the task has classes or values.

        Raises:
            UserError: The task's outputs cannot be averaged.
        """
        if not module.is_classification and not module.schema["y"].keys() & {"values", "outputs"}:
            raise UserError(
                f"callbacks: {type(self).__name__} averages classes or values, not {list(module.schema['y'])}"
            )

    def begin(self, trainer: Trainer, module: TransferModule, loaders: Loaders) -> None:
        """Replaces the module's forward pass by the mean of all passes."""
        forward: Forward = module.forward_domains

        def averaged(batch: Domains) -> dict[str, DomainOutput]:
            found: dict[str, DomainOutput] = {}
            opinions = []
            for member in self.members(module, forward):
                ((domain, output),) = member(batch).items()
                found.setdefault(domain, output)
                opinions.append((output.output.softmax(1) if module.is_classification else output.output).float())
            (output,) = found.values()
            self.opinions = torch.stack(opinions)
            mean = self.opinions.mean(0)
            # the softmax of its logarithm is the mean itself
            output.output = mean.clamp(min=torch.finfo(mean.dtype).tiny).log() if module.is_classification else mean
            return found

        module.forward_domains = averaged  # type: ignore[method-assign]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the module's forward pass and parts."""
        vars(pl_module).pop("forward_domains", None)
        super().on_test_end(trainer, pl_module)

    on_predict_end = on_test_end

    def columns(self, module: TransferModule) -> dict[str, list[float]]:
        """Returns the columns of uncertainty for the last batch."""
        return uncertainty(self.opinions.cpu(), module.is_classification)


class MCDropout(Ensemble):
    """Keeps dropout active, so that each of the `passes` passes is another network (Gal and Ghahramani, ICML 2016).

    Args:
        passes: Number of passes.
    """

    def __init__(self, passes: int = 20) -> None:
        if passes < 2:
            raise UserError(f"passes: {passes} must be at least 2")
        self.passes = passes

    def check(self, module: TransferModule) -> None:
        """Checks that the network has dropout.

        Raises:
            UserError: It has none.
        """
        super().check(module)
        if not _dropouts(module):
            raise UserError(
                "callbacks: MCDropout needs dropout, but neither backbone nor head has any; train with "
                "--model.head MLPHead --model.head.dropout 0.2, or pass several --run for an ensemble"
            )

    def members(self, module: TransferModule, forward: Forward) -> Iterator[Forward]:
        """Yields the same pass each time, with other units dropped."""
        layers = _dropouts(module)
        for layer in layers:
            layer.train()
        try:
            yield from [forward] * self.passes
        finally:
            for layer in layers:
                layer.eval()


class DeepEnsemble(Ensemble):
    """The run's network and others, trained independently (Lakshminarayanan et al., NeurIPS 2017).

    All get the inputs as prepared by the run's data and backbone.

    Args:
        others: Trained modules, e.g. from `load_run`.
    """

    def __init__(self, others: Sequence[LightningModule]) -> None:
        self.others = cast("list[TransferModule]", list(others))

    def check(self, module: TransferModule) -> None:
        """Checks that all have the same task and kind of input.

        Raises:
            UserError: A network has other classes, or takes other inputs.
        """
        super().check(module)
        for other in self.others:
            if not isinstance(other, TransferModule) or other.task_description() != module.task_description():
                raise UserError("run: the runs of an ensemble have different classes or values; use runs of one task")
            if not module.backbone.prepares_like(other.backbone):
                ours, theirs = (type(each.backbone).__name__ for each in (module, other))
                raise UserError(f"run: {ours} and {theirs} take different inputs, so they cannot form an ensemble")

    def members(self, module: TransferModule, forward: Forward) -> Iterator[Forward]:
        """Yields the pass of each network."""
        yield forward
        for other in self.others:
            yield other.to(module.device).eval().forward_domains


def uncertainty(opinions: Tensor, classes: bool) -> dict[str, list[float]]:
    """Computes the uncertainty of T predictions on B samples.

    Args:
        opinions: Probabilities (T, B, C), or values (T, B, K).
        classes: Whether they are probabilities.

    Returns:
        `entropy` and `mutual_information`, B numbers each; for values `std`, or `std_0`, `std_1`, ... for K of them.
    """
    if classes:
        total, own = entropy(opinions.mean(0)), entropy(opinions.flatten(0, 1)).view(opinions.shape[:2])
        found = {"entropy": total, "mutual_information": (total - own.mean(0)).clamp(min=0)}
        return {name: each.double().round(decimals=6).tolist() for name, each in found.items()}  # like probabilities
    std = opinions.std(0)
    return {"std" if std.shape[1] == 1 else f"std_{i}": column.tolist() for i, column in enumerate(std.unbind(1))}


def _dropouts(module: TransferModule) -> list[Any]:
    parts = (module.backbone, module.bottleneck, module.head)
    return [layer for part in parts for layer in part.modules() if isinstance(layer, DROPOUT) and layer.p > 0]
