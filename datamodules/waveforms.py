"""Augmentation of recordings: transforms of a waveform (T,), random by torch's seed, for `--data.augment`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from datamodules.audio import EXTENSIONS, AudioReader, first_rate
from datamodules.errors import DataError
from datamodules.listing import list_files
from datamodules.paths import expand_path


class RandomGain(nn.Module):
    """Makes a recording louder or softer.

    Args:
        decibels: By at most so much.
    """

    def __init__(self, decibels: float = 6.0) -> None:
        super().__init__()
        self.decibels = decibels

    def forward(self, wave: Tensor) -> Tensor:
        """(T,) -> (T,)."""
        return wave * 10 ** (_uniform(-self.decibels, self.decibels) / 20)


class RandomTimeShift(nn.Module):
    """Moves a recording to earlier or later; what leaves it is lost, and silence comes in.

    Args:
        share: Of its length, at most.

    Raises:
        DataError: It is no share.
    """

    def __init__(self, share: float = 0.1) -> None:
        super().__init__()
        if not 0 <= share <= 1:
            raise DataError(f"share: {share} must lie in [0, 1]")
        self.share = share

    def forward(self, wave: Tensor) -> Tensor:
        """(T,) -> (T,)."""
        by = round(_uniform(-self.share, self.share) * len(wave))
        moved = torch.zeros_like(wave)
        moved[max(0, by) : len(wave) + by] = wave[max(0, -by) : len(wave) - by]
        return moved


class BackgroundNoise(nn.Module):
    """Adds a random piece of a random recording of a folder.

    Args:
        folder: Recordings of noise, at the rate of the data; shorter ones are repeated.
        rate: Samples a second of the data, to which the noise is resampled; None leaves it as it is.
        softest: The noise's level below the recording's, in dB: signal-to-noise ratios are drawn from here ...
        loudest: ... to here.
        probability: The share of recordings that get any.

    Raises:
        DataError: The folder has no recordings; no share, or the levels are the wrong way round.
    """

    def __init__(
        self,
        folder: Path | str,
        rate: int | None = None,
        softest: float = 30.0,
        loudest: float = 10.0,
        probability: float = 0.5,
    ) -> None:
        super().__init__()
        if loudest > softest or not 0 <= probability <= 1:
            raise DataError(
                f"softest, loudest, probability: {softest} dB must not be below {loudest} dB, and {probability} a share"
            )
        path = expand_path(folder, "folder")
        assert path is not None
        self.paths = list_files(path, EXTENSIONS, None, "file").paths
        self.reader = AudioReader(rate or first_rate(self.paths, "rate"), 600.0, False)
        self.softest, self.loudest, self.probability = softest, loudest, probability

    def forward(self, wave: Tensor) -> Tensor:
        """(T,) -> (T,)."""
        if float(torch.rand(())) >= self.probability:
            return wave
        noise = self.reader.read(self.paths[int(torch.randint(len(self.paths), ()))])
        noise = noise.repeat(-(-len(wave) // len(noise)))
        begin = int(torch.randint(len(noise) - len(wave) + 1, ()))
        noise = noise[begin : begin + len(wave)]
        loudness, noise_loudness = wave.square().mean().sqrt(), noise.square().mean().sqrt()
        ratio = 10 ** (_uniform(self.loudest, self.softest) / 20)
        return wave + noise * loudness / (ratio * noise_loudness.clamp(min=float(np.finfo(np.float32).tiny)))


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))
