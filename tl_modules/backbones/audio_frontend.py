"""The front end of audio networks: resampling, log-mel bands, standardisation and masking.

waveforms (T,) -> Resample (in the loader's workers) -> Padded (B, T) -> LogMel -> Standardised -> SpecAugment
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tl_modules.batch.samples import Padded
from tl_modules.errors import UserError

__all__ = ["LogMel", "SpecAugment"]


@dataclass(frozen=True)
class Resample:
    """Pads waveforms and resamples them to the network's rate, in a loader's worker.

    Args:
        rate: Samples per second of the data.
        wanted: Samples per second of the result.
    """

    rate: int | None = None
    wanted: int | None = None

    def __call__(self, waves: Sequence[Any]) -> Padded:
        """Converts waveforms (T,), tensors or arrays, to Padded (B, T) float32."""
        return Padded.of([self.one(torch.as_tensor(wave, dtype=torch.float32)) for wave in waves])

    def one(self, wave: Tensor) -> Tensor:
        """Resamples a waveform (T,)."""
        if wave.ndim != 1 or not len(wave):
            raise UserError(f"data: a recording must be a waveform (T,), not empty, but is {tuple(wave.shape)}")
        if self.rate == self.wanted:
            return wave
        import soxr

        found = soxr.resample(wave.numpy(), self.rate, self.wanted)
        return torch.from_numpy(found) if len(found) else wave.new_zeros(1)


class LogMel(nn.Module):
    """Log-mel spectrogram: ln max(floor, sum_k filter[m, k] |STFT[k, l]|^2), frame l centred at sample l * hop.

    With 16,000 samples per second, `scale` and `norm` slaney, a window of n_fft samples and log10 instead of ln it
    equals librosa's `melspectrogram` with zero padding; with htk and without norm it equals torchaudio's.

    Args:
        rate: Samples per second.
        mels: Number of bands.
        window: Length of a frame in seconds, with a Hann window.
        hop: Seconds between frames.
        n_fft: Length of the Fourier transform in samples; None is the next power of two of the window, at least 512.
        low: Lowest frequency in Hz.
        high: Highest frequency in Hz; None is half of the rate.
        scale: The mel scale, 2595 log10(1 + f / 700) (htk), or linear below 1000 Hz and logarithmic above (slaney).
        norm: Divides each filter by half its width in Hz (slaney), so that all have one area.
        floor: The smallest power that is distinguished.

    Raises:
        UserError: The bands are not between 0 and half of the rate, or a length is not above 0.
    """

    in_no_stage = True  # but counts as frozen, since it has no parameters
    filters: Tensor
    hann: Tensor

    def __init__(
        self,
        rate: int,
        mels: int = 40,
        window: float = 0.025,
        hop: float = 0.01,
        n_fft: int | None = None,
        low: float = 0.0,
        high: float | None = None,
        scale: Literal["htk", "slaney"] = "htk",
        norm: bool = False,
        floor: float = 1e-6,
    ) -> None:
        super().__init__()
        size, self.hop, high = round(window * rate), round(hop * rate), high or rate / 2
        if not 0 <= low < high <= rate / 2 or min(mels, size, self.hop, floor) <= 0:
            raise UserError(f"mels: {mels} bands from {low:g} to {high:g} Hz do not fit {rate} samples per second")
        self.n_fft, self.floor = n_fft or max(512, 2 ** math.ceil(math.log2(size))), floor
        filters = mel_filters(rate, self.n_fft, mels, low, high, scale, norm)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("hann", torch.hann_window(size), persistent=False)

    def frames(self, samples: Any) -> Any:
        """Returns the number of frames of this many samples."""
        return samples // self.hop + 1

    def forward(self, waves: Tensor) -> Tensor:
        """Maps (B, T) to (B, T // hop + 1, mels), in float32."""
        with torch.autocast(waves.device.type, enabled=False):
            spectrum = torch.stft(
                waves.float(),
                self.n_fft,
                self.hop,
                len(self.hann),
                self.hann,
                pad_mode="constant",
                return_complex=True,
            )
            power = spectrum.real.square() + spectrum.imag.square()
            return (self.filters @ power).clamp(min=self.floor).log().transpose(1, 2)


def mel_filters(rate: int, n_fft: int, mels: int, low: float, high: float, scale: str, norm: bool) -> Tensor:
    """Returns triangular filters, (mels, n_fft // 2 + 1), with corners equally spaced in mel."""
    step = math.log(6.4) / 27  # Slaney's scale: 27 mels from 1000 to 6400 Hz

    def to_mel(hertz: float) -> float:
        if scale == "htk":
            return 2595 * math.log10(1 + hertz / 700)
        return hertz * 3 / 200 if hertz < 1000 else 15 + math.log(hertz / 1000) / step

    mel = torch.linspace(to_mel(low), to_mel(high), mels + 2, dtype=torch.float64)
    if scale == "htk":
        corners = 700 * (10 ** (mel / 2595) - 1)
    else:
        corners = torch.where(mel < 15, mel * 200 / 3, 1000 * (step * (mel - 15)).exp())
    bins = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    left, middle, right = (part[:, None] for part in (corners[:-2], corners[1:-1], corners[2:]))
    filters = torch.minimum((bins - left) / (middle - left), (right - bins) / (right - middle)).clamp(min=0)
    return (filters * 2 / (right - left) if norm else filters).float()


class Standardised(nn.Module):
    """Normalises each band of a recording to mean 0 and deviation 1 over its frames, to remove microphone and loudness.

    Cepstral mean and variance normalisation (Viikki and Laurila, Speech Communication 1998), on bands.
    """

    in_no_stage = True

    def forward(self, bands: Tensor, inside: Tensor) -> Tensor:
        """Maps (B, L, M), and a mask (B, L) that is True in recordings, to (B, L, M), 0 in the padding."""
        weight = inside[..., None].to(bands.dtype)
        count = weight.sum(1, keepdim=True).clamp(min=1)
        centred = (bands - (bands * weight).sum(1, keepdim=True) / count) * weight
        deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
        return centred / deviation.clamp(min=0.1)  # nearly silent bands stay small


class SpecAugment(nn.Module):
    """Masks random stretches of time and bands of frequency with 0 in training (Park et al., Interspeech 2019).

    It belongs to the first stage: while that is frozen, nothing is masked.

    Args:
        masks: Number of stretches, and of bands; 0 disables it.
        time: The longest stretch, as a share of the recording.
        frequency: The widest band, as a share of all bands.
    """

    def __init__(self, masks: int = 2, time: float = 0.2, frequency: float = 0.2) -> None:
        super().__init__()
        if masks < 0 or not (0 <= time <= 1 and 0 <= frequency <= 1):
            raise UserError(f"masks, time, frequency: {masks}, {time} and {frequency} must be a count and two shares")
        self.masks, self.time, self.frequency = masks, time, frequency

    def forward(self, bands: Tensor, lengths: Tensor) -> Tensor:
        """Masks (B, L, M), given the number of frames of each recording (B,)."""
        if not self.training or not self.masks:
            return bands
        hidden = self._hidden(bands.shape[1], lengths, self.time)[:, :, None]
        whole = torch.full_like(lengths, bands.shape[2])
        return bands.masked_fill(hidden | self._hidden(bands.shape[2], whole, self.frequency)[:, None], 0)

    def _hidden(self, size: int, lengths: Tensor, share: float) -> Tensor:
        """Returns (B, size), True in `masks` random stretches of at most that share of each length."""
        draws = torch.rand(2, len(lengths), self.masks, 1, device=lengths.device)
        widths = draws[0] * share * lengths[:, None, None]
        starts = draws[1] * (lengths[:, None, None] - widths)
        positions = torch.arange(size, device=lengths.device)
        return ((positions >= starts.floor()) & (positions < (starts + widths).floor())).any(1)
