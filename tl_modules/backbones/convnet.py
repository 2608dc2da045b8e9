"""Small networks for small images, trained from scratch or from a run."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from tl_modules.backbones.base import PretrainedWeights
from tl_modules.backbones.vision import IMAGENET_MEAN, ImageBackbone, Statistics

__all__ = ["ConvNet", "LeNet"]


class ConvNet(ImageBackbone):
    """Three stages of two 3 x 3 convolutions with BatchNorm and pooling, for images of 28 to 64 px.

    Args:
        width: Channels of the first stage; each further stage has twice as many.
        weights: A local file or a run of `tl fit`; None starts at random.
        strict: Rejects weights that lack a tensor, have one of another shape, or have further blocks.
        mean: Per channel, on the [0, 1] scale; None is ImageNet's.
        std: Per channel, on the [0, 1] scale; None is ImageNet's.
    """

    def __init__(
        self,
        width: int = 32,
        weights: PretrainedWeights = None,
        strict: bool = True,
        mean: Statistics = None,
        std: Statistics = None,
    ) -> None:
        widths = [len(mean or IMAGENET_MEAN), width, 2 * width, 4 * width]
        stages = [self._stage(i, o) for i, o in pairwise(widths)]
        super().__init__(nn.Sequential(*stages), widths[-1], mean, std)
        self.load_pretrained(weights, strict)

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Sequential:
        def conv(i: int) -> list[nn.Module]:
            return [nn.Conv2d(i, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

        return nn.Sequential(*conv(inputs), *conv(outputs), nn.MaxPool2d(2))

    def stages(self) -> list[nn.Module]:
        """Returns the three stages."""
        return list(self.model.children())


class LeNet(ImageBackbone):
    """The feature extractor for digits of Ganin et al. (JMLR 2016), 768 wide: two 5 x 5 convolutions, pooled.

    The paper's label predictor is `MLPHead` (there with two hidden layers of 100); its critic has one hidden layer of
    100.

    Args:
        batch_norm: Adds BatchNorm after each convolution (and omits its bias).
        instance_norm: First normalises each channel of an image to mean 0 and deviation 1, which removes brightness and
            contrast (Shu et al., ICLR 2018, for the same digits).
        dropout: Probability of dropping a whole channel of the second convolution.
        weights: A local file or a run of `tl fit`; None starts at random.
        strict: Rejects weights that lack a tensor, have one of another shape, or have further blocks.
        mean: Per channel, on the [0, 1] scale; None is ImageNet's.
        std: Per channel, on the [0, 1] scale; None is ImageNet's.
    """

    def __init__(
        self,
        batch_norm: bool = False,
        instance_norm: bool = False,
        dropout: float = 0.0,
        weights: PretrainedWeights = None,
        strict: bool = True,
        mean: Statistics = None,
        std: Statistics = None,
    ) -> None:
        def stage(inputs: int, outputs: int, *rest: nn.Module) -> nn.Sequential:
            norm = [nn.BatchNorm2d(outputs)] if batch_norm else []
            return nn.Sequential(nn.Conv2d(inputs, outputs, 5, bias=not batch_norm), *norm, nn.ReLU(), *rest)

        channels = len(mean or IMAGENET_MEAN)
        first = stage(channels, 32, nn.MaxPool2d(2))
        if instance_norm:
            first.insert(0, nn.InstanceNorm2d(channels))
        second = stage(32, 48, nn.Dropout2d(dropout), nn.AdaptiveMaxPool2d(4), nn.Flatten())
        super().__init__(nn.Sequential(first, second), 48 * 4 * 4, mean, std)
        self.load_pretrained(weights, strict)

    def stages(self) -> list[nn.Module]:
        """Returns each convolution as a stage."""
        return list(self.model.children())
