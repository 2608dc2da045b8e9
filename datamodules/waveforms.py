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
    """Makes a recording louder or softer at random.

    Args:
        decibels: The largest change, in dB.
    """

    def __init__(self, decibels: float = 6.0) -> None:
        super().__init__()
        self.decibels = decibels

    def forward(self, wave: Tensor) -> Tensor:
        """Scales a waveform (T,)."""
        return wave * 10 ** (_uniform(-self.decibels, self.decibels) / 20)


class RandomTimeShift(nn.Module):
    """Shifts a recording in time at random; samples shifted out are lost, and silence comes in.

    Args:
        share: The largest shift, as a share of the length.

    Raises:
        DataError: `share` is not in [0, 1].
    """

    def __init__(self, share: float = 0.1) -> None:
        super().__init__()
        if not 0 <= share <= 1:
            raise DataError(f"share: {share} must be in [0, 1]")
        self.share = share

    def forward(self, wave: Tensor) -> Tensor:
        """Shifts a waveform (T,)."""
        by = round(_uniform(-self.share, self.share) * len(wave))
        moved = torch.zeros_like(wave)
        moved[max(0, by) : len(wave) + by] = wave[max(0, -by) : len(wave) - by]
        return moved


class BackgroundNoise(nn.Module):
    """Adds a random piece of a random recording from a folder.

    Args:
        folder: Recordings of noise, at the rate of the data; shorter ones are repeated.
        rate: Samples per second of the data, to which the noise is resampled; None does not resample.
        softest: The signal-to-noise ratio, in dB, is drawn from the range between this ...
        loudest: ... and this.
        probability: The share of recordings to which noise is added.

    Raises:
        DataError: The folder has no recordings, the probability is not in [0, 1], or the levels are reversed.
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
        """Adds noise to a waveform (T,)."""
        if float(torch.rand(())) >= self.probability:
            return wave
        noise = self.reader.read(Path(self.paths[int(torch.randint(len(self.paths), ()))]))
        noise = noise.repeat(-(-len(wave) // len(noise)))
        begin = int(torch.randint(len(noise) - len(wave) + 1, ()))
        noise = noise[begin : begin + len(wave)]
        loudness, noise_loudness = wave.square().mean().sqrt(), noise.square().mean().sqrt()
        ratio = 10 ** (_uniform(self.loudest, self.softest) / 20)
        return wave + noise * loudness / (ratio * noise_loudness.clamp(min=float(np.finfo(np.float32).tiny)))


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))
