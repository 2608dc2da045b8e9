"""What every fine-tuning strategy is: a pure function from how far training is to what is open.

    stages   [ 0 ][ 1 ][ 2 ][ 3 ][ head ]
    depth 0    -    -    -    -     x        x trains; - is closed: no gradient, and in eval mode, so that
    depth 2    -    -    x    x     x        BatchNorm's statistics rest too
    depth 4    x    x    x    x     x

Nothing is remembered: a resumed run derives what is open from its epoch or step. Every parameter is in the optimizer,
in a named group, from the first step, and every parameter that will ever train requires a gradient when the Trainer
wraps the module, so that DDP sees it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from torch.nn.modules.batchnorm import _BatchNorm

from tl_modules.errors import UserError

if TYPE_CHECKING:
    from tl_modules.base import TransferModule

Unit = Literal["epochs", "steps", "fraction"]
# a pretrained backbone is torn apart by the learning rate that a new head needs; its last stage alone stands more
PRETRAINED_LR, LAST_STAGE_LR = 1 / 30, 1 / 10


class FineTuning:
    """Decides which stages of the backbone train; the head and the methods always do.

    A subclass writes `depth`. It may only open stages as training goes on, never close one.

    Attributes:
        unit: What `depth` counts in.

    Args:
        lr_decay: Learning rate of a stage relative to the one above it, from the head down (discriminative learning
            rates, Howard and Ruder, ACL 2018); 1 gives all stages the same.
        backbone_lr: Learning rate of the backbone relative to the head's. None: 1/30 where the backbone is pretrained
            (`LastStages`: more), 1 where it starts at random.
        batch_norm: "train" normalises by the batch in open stages and moves the running statistics; "eval" keeps those
            of the pretrained weights, which a little data cannot better. None is "eval" where a pretrained backbone is
            fine-tuned on one labelled domain, and "train" elsewhere. Layers without weights, which only standardise,
            always train.
    """

    unit: Unit = "epochs"

    def __init__(
        self,
        lr_decay: float = 1.0,
        backbone_lr: float | None = None,
        batch_norm: Literal["train", "eval"] | None = None,
    ) -> None:
        if not 0 < lr_decay <= 1:
            raise UserError(f"lr_decay: {lr_decay} must lie in (0, 1]")
        if backbone_lr is not None and not 0 < backbone_lr <= 1:
            raise UserError(f"backbone_lr: {backbone_lr} must lie in (0, 1]")
        self.lr_decay, self.backbone_lr, self.batch_norm = lr_decay, backbone_lr, batch_norm

    def relative_lr(self, random: bool) -> float:
        """The backbone's learning rate relative to the head's, where its weights start at random or not."""
        if self.backbone_lr is not None:
            return self.backbone_lr
        return 1.0 if random else PRETRAINED_LR

    def depth(self, now: float, stages: int) -> int:
        """How many of the `stages`, counted from the head, train.

        Args:
            now: How far training is, in `unit`: the epoch (from 0), the optimizer steps taken, or their fraction.
            stages: How many the backbone has.
        """
        raise NotImplementedError

    @property
    def end(self) -> float:
        """The `now` after which nothing opens any more."""
        return 1.0 if self.unit == "fraction" else float(sys.maxsize)

    def opens_later(self, stages: int) -> bool:
        """Whether a stage that is closed at the start will train."""
        return self.depth(self.end, stages) != self.depth(0, stages)

    def prepare(self, module: TransferModule) -> None:
        """Called once when the module is built: closes for good what never opens."""
        self.apply(module, self.end)

    def apply(self, module: TransferModule, now: float) -> None:
        """Opens and closes the stages: requires_grad and, in training, train or eval mode."""
        stages = module.backbone.stages()
        closed = len(stages) - self.depth(now, len(stages))
        # what belongs to no stage (containers, a BatchNorm without parameters) rests until all stages are open
        module.backbone.train(module.training and not closed)
        for number, stage in enumerate(stages):
            stage.requires_grad_(number >= closed)
            stage.train(number >= closed and module.training)
        if self.batch_norm == "eval" or (self.batch_norm is None and module.keeps_statistics()):
            for layer in module.backbone.modules():
                if isinstance(layer, _BatchNorm) and layer.affine:
                    layer.eval()

    def param_groups(self, module: TransferModule) -> Iterator[dict[str, Any]]:
        """Every parameter once, in groups `head`, the methods' names, `stage_N`; `lr_scale` multiplies the lr."""
        parts = [("head", list(module.head.parameters()), 1.0)]
        # methods also keep teachers and starts, which never train
        parts += [(name, [p for p in m.parameters() if p.requires_grad], 1.0) for name, m in module.named_methods()]
        stages = module.backbone.stages()
        for number in reversed(range(len(stages))):
            scale = module.backbone_lr * self.lr_decay ** (len(stages) - number)
            parts.append((f"stage_{number}", list(stages[number].parameters()), scale))
        for name, parameters, scale in parts:
            if parameters:
                yield {"name": name, "params": parameters, "lr_scale": scale}
