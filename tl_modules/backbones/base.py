"""What every backbone is: raw input in, features out, divided into stages."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from tl_modules.backbones.weights import Pretrained, State, is_local, linear_head, load, read
from tl_modules.batch.protocol import AbstractBackbone
from tl_modules.errors import UserError

__all__ = ["Backbone"]

Weights = str | Path | None


class Backbone(AbstractBackbone):
    """Maps raw input to features and owns its preprocessing (normalise, tokenise, mel).

    A subclass sets `out_features` and writes `forward` and `stages`.

    Attributes:
        name: Of the architecture, for messages.
        model: The network that `load_pretrained` fills.
        classifier: The name in `model` of the classifier's last layer, which was taken out.
        out_features: Width of the features.
        pretrained: Where the weights came from; None if they are random, or not from `load_pretrained`.
        random: Whether the weights are known to start at random; a network that says nothing counts as pretrained.
        bf16: The kinds of device, of "cpu" and "cuda", on which it is faster in bfloat16 and as accurate.
    """

    name: str = ""
    model: nn.Module
    classifier: str = ""
    out_features: int
    pretrained: Pretrained | None = None
    random: bool = False
    bf16: tuple[str, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Features of shape (B, out_features) for a batch of raw inputs."""
        raise NotImplementedError

    @abstractmethod
    def stages(self) -> list[nn.Module]:
        """The parts from input to output; together they hold every parameter exactly once."""

    def load_pretrained(self, weights: Weights, strict: bool, hub: Callable[[str], State] | None = None) -> None:
        """Fills `model` from a local file, a run of ours, or what `hub` fetches for a name; None leaves it random.

        Raises:
            UserError: The weights cannot be had or do not fit.
        """
        self.random = weights is None
        if weights is None:
            return
        kind = type(self).__name__
        if is_local(weights):
            self.pretrained = read(weights)
        elif hub is not None:
            self.pretrained = Pretrained(str(weights), hub(str(weights)))
        else:
            raise UserError(f"weights: {kind} has no hub entry {weights}; give a file or the directory of a run")
        load(self.model, self.pretrained, strict, f"{kind} {self.name}".strip())
        head = self.pretrained.head or linear_head(self.pretrained.state, self.classifier)
        self.pretrained = replace(self.pretrained, state={}, head=head)  # the model has the others now
