"""What every backbone is: raw input in, features out, divided into stages."""

from __future__ import annotations

from torch import Tensor, nn

from tl_modules.backbones.weights import Pretrained


class Backbone(nn.Module):
    """Maps raw input to features and owns its preprocessing (normalise, tokenise, mel).

    A subclass sets `out_features` and writes `forward` and `stages`.

    Attributes:
        out_features: Width of the features.
        pretrained: Where the weights came from, or None if they are random.
        bf16: The kinds of device, of "cpu" and "cuda", on which it is faster in bfloat16 and as accurate.
    """

    out_features: int
    pretrained: Pretrained | None = None
    bf16: tuple[str, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Features of shape (B, out_features) for a batch of raw inputs."""
        raise NotImplementedError

    def stages(self) -> list[nn.Module]:
        """The parts from input to output; together they hold every parameter exactly once."""
        raise NotImplementedError
