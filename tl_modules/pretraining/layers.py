"""Networks that pretraining puts behind a backbone, and discards afterwards."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import nn


def projector(widths: list[int], last_norm: bool = False, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Builds linear layers of these widths with BatchNorm and an activation between them.

    Args:
        widths: Of the input, the hidden layers and the output.
        last_norm: Adds BatchNorm after the last layer too, as SimCLR does.
        activation: A class.
    """
    layers: list[nn.Module] = []
    for position, (inputs, outputs) in enumerate(pairwise(widths), 2):
        last = position == len(widths)
        norm = not last or last_norm
        layers += [nn.Linear(inputs, outputs, bias=not norm), *([nn.BatchNorm1d(outputs)] if norm else [])]
        layers += [] if last else [activation()]
    return nn.Sequential(*layers)


def upsampler(inputs: int, channels: int, size: int, width: int) -> nn.Sequential:
    """Builds DCGAN's network from vectors to images: a grid of 5 to 10 positions, then transposed convolutions.

    (B, inputs) -> (B, channels, size, size)

    Args:
        inputs: Width of the vectors.
        channels: Channels of the images.
        size: Side of the images in pixels.
        width: Channels before the last convolution; each earlier layer has twice as many, at most 512.
    """
    doublings = max(0, round(math.log2(size / 7)))
    start = math.ceil(size / 2**doublings)
    widths = [min(512, width * 2**step) for step in reversed(range(doublings + 1))]
    grid = widths[0], start, start
    layers: list[nn.Module] = [nn.Linear(inputs, math.prod(grid), bias=False), nn.Unflatten(1, grid)]
    layers += [nn.BatchNorm2d(widths[0]), nn.ReLU()]
    for before, after in pairwise(widths):
        layers += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    layers.append(nn.Conv2d(widths[-1], channels, 3, padding=1))
    if spare := start * 2**doublings - size:
        layers.append(nn.ZeroPad2d((0, -spare, 0, -spare)))  # crops the right and the bottom
    return nn.Sequential(*layers)
