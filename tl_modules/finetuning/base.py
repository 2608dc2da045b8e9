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

from tl_modules.errors import UserError

if TYPE_CHECKING:
    from tl_modules.base import TransferModule

Unit = Literal["epochs", "steps", "fraction"]


class FineTuning:
    """Decides which stages of the backbone train; the head and the methods always do.

    A subclass writes `depth`. It may only open stages as training goes on, never close one.

    Attributes:
        unit: What `depth` counts in.

    Args:
        lr_decay: Learning rate of a stage relative to the one above it, from the head down (discriminative learning
            rates, Howard and Ruder, ACL 2018); 1 gives all the same.
    """

    unit: Unit = "epochs"

    def __init__(self, lr_decay: float = 1.0) -> None:
        if not 0 < lr_decay <= 1:
            raise UserError(f"lr_decay: {lr_decay} must lie in (0, 1]")
        self.lr_decay = lr_decay

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
        if closed == len(stages):
            module.backbone.eval()
        for number, stage in enumerate(stages):
            stage.requires_grad_(number >= closed)
            stage.train(number >= closed and module.training)

    def param_groups(self, module: TransferModule) -> Iterator[dict[str, Any]]:
        """Every parameter once, in groups `head`, the methods' names, `stage_N`; `lr_scale` multiplies the lr."""
        parts = [("head", list(module.head.parameters()), 1.0)]
        # methods also keep teachers and starts, which never train
        parts += [(name, [p for p in m.parameters() if p.requires_grad], 1.0) for name, m in module.named_methods()]
        stages = module.backbone.stages()
        for number in reversed(range(len(stages))):
            scale = self.lr_decay ** (len(stages) - number)
            parts.append((f"stage_{number}", list(stages[number].parameters()), scale))
        for name, parameters, scale in parts:
            if parameters:
                yield {"name": name, "params": parameters, "lr_scale": scale}
