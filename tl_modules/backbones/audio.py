"""Backbones for recordings: a small network of our own, image networks on spectrograms, foreign modules.

    waveforms, Padded (B, T) -> bands of frames -> stage 0 -> stage 1 -> ... -> frames, Padded (B, L, D) -> mean

Padding after a recording's end is treated as silence: a sample's features depend neither on its batch nor on padding.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tl_modules.backbones.audio_frontend import LogMel, Resample, SpecAugment, Standardised
from tl_modules.backbones.base import Backbone, PretrainedWeights
from tl_modules.backbones.stages import stages_by_name
from tl_modules.backbones.vision import ImageBackbone
from tl_modules.batch.samples import Padded
from tl_modules.errors import UserError

__all__ = ["AudioBackbone", "Spectrogram", "SpeechConvNet", "TorchBackbone"]

log = logging.getLogger(__name__)


class AudioBackbone(Backbone):
    """Takes waveforms of any length; the base class of backbones for recordings.

    Args:
        rate: Samples per second of the network's input, to which data of another rate are resampled; None is the
            data's.
    """

    prepare: Resample = Resample()
    decided_by_schema: tuple[str, ...] = ("rate",)

    def __init__(self, rate: int | None = None) -> None:
        super().__init__()
        if rate is not None and rate < 1:
            raise UserError(f"rate: {rate} must be at least 1 sample per second")
        self.rate = rate

    def bind_schema(self, x: Mapping[str, Any]) -> None:
        """Takes the data's rate, or resamples to its own.

        Raises:
            UserError: The inputs are not recordings, the rate is unknown, or soxr is needed but missing.
        """
        kind = type(self).__name__
        self.refuse_others(x, "audio", "recordings")
        given = (x.get("audio") or {}).get("rate")
        rate = self.rate or given
        if rate is None:
            raise UserError(f"rate: the data does not state its sampling rate; pass one to {kind}")
        self.rate, self.prepare = rate, Resample(given or rate, rate)
        if given not in (None, rate):
            try:
                import soxr  # noqa: F401
            except ImportError as error:
                raise UserError("resampling needs soxr: pip install 'lightning-transfer[audio]'") from error
            log.info("recordings are resampled from %d to %d Hz, the rate of %s", given, rate, kind)
        self.build(rate)

    def build(self, rate: int) -> None:
        """Builds the parts that depend on the rate, once it is known."""


class FrameBackbone(AudioBackbone):
    """Computes frames of bands from waveforms, for our own network and for image networks."""

    def __init__(self, rate: int | None, mels: int, masks: int) -> None:
        super().__init__(rate)
        self.mels, self.standardise, self.augment = mels, Standardised(), SpecAugment(masks)

    def build(self, rate: int) -> None:
        """Builds the front end."""
        self.log_mel = LogMel(rate, self.mels)

    def bands(self, x: Padded) -> Padded:
        """Maps waveforms, Padded (B, T), to standardised bands, Padded (B, L, mels)."""
        if not hasattr(self, "log_mel"):
            self.bind_schema({})
        if not isinstance(x, Padded):
            raise UserError(
                f"{type(self).__name__} takes recordings, but the inputs are not; use data such as AudioFolders"
            )
        lengths = self.log_mel.frames(x.lengths)
        frames = x.replace(self.log_mel(x.values), lengths)
        return x.replace(self.augment(self.standardise(frames.values, frames.mask), lengths), lengths)


class ConvBlock(nn.Module):
    """Two convolutions over time with LayerNorm and a residual connection.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        kernel: Kernel size in frames, an odd number.
        stride: Stride in frames.
        dropout: Probability of dropping a value before the second convolution.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.stride = stride
        self.first = nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2)
        self.second = nn.Conv1d(outputs, outputs, kernel, 1, kernel // 2)
        self.carry = nn.Linear(inputs, outputs)
        self.norms = nn.ModuleList(nn.LayerNorm(outputs) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, frames: Tensor, inside: Tensor) -> Tensor:
        """Maps (B, L, inputs), and a mask (B, L, 1) that is 1 in recordings, to (B, ceil(L / stride), outputs)."""
        shorter = inside[:, :: self.stride]
        h = self.first((frames * inside).transpose(1, 2)).transpose(1, 2)
        h = self.dropout(self.norms[0](h).relu()) * shorter
        h = self.norms[1](self.second(h.transpose(1, 2)).transpose(1, 2))
        return cast(Tensor, (h + self.carry(frames[:, :: self.stride])).relu())


class SpeechConvNet(FrameBackbone):
    """A small network for words and short sounds: residual convolutions over the time axis of log-mel bands.

    After TC-ResNet (Choi et al., Interspeech 2019), with LayerNorm of each frame instead of BatchNorm, which would see
    padding. 0.5 million parameters.

    Args:
        width: Channels of the first stage; the last of three has twice as many.
        kernel: Kernel size in frames, an odd number.
        dropout: Dropout probability within the blocks.
        masks: Number of stretches of time and of frequency that `SpecAugment` masks in training.
        mels: Number of bands.
        rate: Samples per second; None is the data's.
        weights: A local file or a run of `tl fit`; None starts at random.
        strict: Rejects weights that lack a tensor, have one of another shape, or have further blocks.
    """

    def __init__(
        self,
        width: int = 64,
        kernel: int = 9,
        dropout: float = 0.1,
        masks: int = 2,
        mels: int = 40,
        rate: int | None = None,
        weights: PretrainedWeights = None,
        strict: bool = True,
    ) -> None:
        super().__init__(rate, mels, masks)
        if width < 1 or kernel % 2 == 0:
            raise UserError(f"width, kernel: {width} must be at least 1, and {kernel} an odd number of frames")
        widths = [mels, width, 3 * width // 2, 2 * width]
        self.model = nn.ModuleList(
            ConvBlock(i, o, kernel, 1 + (number < 2), dropout) for number, (i, o) in enumerate(pairwise(widths))
        )
        self.out_features = widths[-1]
        self.load_pretrained(weights, strict)

    def forward(self, x: Padded) -> Padded:
        """Maps waveforms, Padded (B, T), to frames, Padded (B, L, out_features), of 40 ms each."""
        x = self.bands(x)
        for block in self.model.children():
            values = block(x.values, x.mask[..., None].to(x.values.dtype))
            x = x.replace(values, -(-x.lengths // cast(ConvBlock, block).stride))
        return x

    def stages(self) -> list[nn.Module]:
        """Returns the blocks; SpecAugment belongs to the first."""
        first, *others = self.model.children()
        return [nn.ModuleList([self.augment, first]), *others]


class Spectrogram(FrameBackbone):
    """Any image backbone on log-mel spectrograms, (1, mels, frames), with the same number of frames for all recordings.

    Args:
        backbone: The image backbone; if it has a fixed input size, e.g. a ViT, it needs `image_size`.
        seconds: Length used of a recording: the middle of longer ones; shorter ones are padded at the end.
        image_size: Side in pixels to which spectrograms are resized; None does not resize.
        masks: Number of stretches of time and of frequency that `SpecAugment` masks in training.
        mels: Number of bands.
        rate: Samples per second; None is the data's.

    Raises:
        UserError: The backbone does not take images, or a length is not above 0.
    """

    def __init__(
        self,
        backbone: ImageBackbone,
        seconds: float = 1.0,
        image_size: int | None = None,
        masks: int = 2,
        mels: int = 64,
        rate: int | None = None,
    ) -> None:
        super().__init__(rate, mels, masks)
        if seconds <= 0 or (image_size is not None and image_size < 1):
            raise UserError(f"seconds, image_size: {seconds} and {image_size} must be above 0")
        if not isinstance(backbone, ImageBackbone):
            raise UserError(f"backbone: Spectrogram needs an image backbone, not {type(backbone).__name__}")
        self.inner, self.seconds, self.image_size = backbone, seconds, image_size
        self.out_features, self.name = backbone.out_features, backbone.name
        self.random, self.pruned, self.bf16_devices = backbone.random, backbone.pruned, backbone.bf16_devices

    def forward(self, x: Padded) -> Any:
        """Maps waveforms, Padded (B, T), to the image backbone's features of (B, 1, mels, frames) in [0, 1]."""
        bands, frames = self.bands(x), self.log_mel.frames(round(self.seconds * cast(int, self.rate)))
        begin = (bands.lengths - frames).clamp(min=0) // 2
        positions = begin[:, None] + torch.arange(frames, device=begin.device)
        there = (positions < bands.lengths[:, None])[..., None]
        positions = positions.clamp(max=bands.values.shape[1] - 1)
        cut = bands.values.gather(1, positions[..., None].expand(-1, -1, self.mels)) * there
        images = (cut / 8 + 0.5).clamp(0, 1).transpose(1, 2)[:, None]  # +-4 standard deviations
        if self.image_size is not None:
            images = F.interpolate(images, (self.image_size,) * 2, mode="bilinear", antialias=True)
        return self.inner(images)

    def pooled_features(self, features: Any) -> Tensor:
        """Returns the image backbone's pooled features."""
        return self.inner.pooled_features(features)

    def stages(self) -> list[nn.Module]:
        """Returns the stages of the image backbone; SpecAugment belongs to the first."""
        first, *others = self.inner.stages()
        return [nn.ModuleList([self.augment, first]), *others]


class TorchBackbone(AudioBackbone):
    """Any torch module for waveforms, made by your own function. **Running it executes your code**: `--trust mine`.

    The module's forward maps waveforms (B, T) to (B, D), or to frames (B, L, D), which are averaged. Recordings are
    passed one by one, unless the forward takes a second argument: then it gets zero-padded waveforms and their lengths
    (B,), and returns frames and their lengths.

    Args:
        loader: The function, as module.function; the weights of the module it returns count as pretrained.
        arguments: Passed to it by name, e.g. {weights: FILE}.
        rate: Samples per second of the module's input; None is the data's.
        weights: A local file or a run of `tl fit`; None keeps the loader's weights.
        strict: Rejects weights that lack a tensor, have one of another shape, or have further blocks.

    Raises:
        UserError: The function does not exist, does not return a module, or the weights do not fit.
    """

    def __init__(
        self,
        loader: str,
        arguments: dict[str, Any] | None = None,
        rate: int | None = None,
        weights: PretrainedWeights = None,
        strict: bool = True,
    ) -> None:
        super().__init__(rate)
        model = imported(loader)(**(arguments or {}))
        if not isinstance(model, nn.Module):
            raise UserError(f"loader: {loader} returns a {type(model).__name__}, not a torch.nn.Module")
        self.name, takes = loader, inspect.signature(model.forward).parameters.values()
        self.model = model if sum(p.default is p.empty for p in takes) > 1 else OneByOne(model)
        self.load_pretrained(weights, strict)
        self.random = False

    def build(self, rate: int) -> None:
        """Finds the width of the features, from one second of noise."""
        with torch.no_grad():
            mode = self.training
            features = self.eval()(Padded.of([torch.rand(rate) - 0.5]))
            self.train(mode)
        self.out_features = features.shape[-1] if isinstance(features, Tensor) else features.values.shape[-1]

    def forward(self, x: Padded) -> Any:
        """Maps waveforms, Padded (B, T), to (B, D), or to frames, Padded (B, L, D)."""
        features, lengths = self.model(x.values, x.lengths)
        return features if lengths is None else x.replace(features, lengths)

    def stages(self) -> list[nn.Module]:
        """Returns the module's children that hold parameters, with lists and sequences unpacked."""
        network = self.model.inner if isinstance(self.model, OneByOne) else self.model
        names = []
        for name, child in network.named_children():
            several = isinstance(child, nn.Sequential | nn.ModuleList)
            names += [f"{name}.{inner}" for inner, _ in child.named_children()] if several else [name]
        return stages_by_name(network, {name: number for number, name in enumerate(names)})


class OneByOne(nn.Module):
    """Runs a module on each recording separately, so that it sees no padding.

    Args:
        inner: Module from (1, T) to (1, D) or (1, L, D).
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Maps (B, T) and (B,) to (B, D) and None, or to frames (B, L, D) and their lengths (B,)."""
        found = [self.inner(wave[None, :length])[0] for wave, length in zip(waves, lengths.tolist(), strict=True)]
        if found[0].ndim == 1:
            return torch.stack(found), None
        frames = nn.utils.rnn.pad_sequence(found, batch_first=True)
        return frames, torch.tensor([len(each) for each in found], device=waves.device)


def imported(path: str) -> Any:
    """Imports the function of a dotted name, which a run may name only if it is trusted (`runs/trust.py`).

    Raises:
        UserError: The function does not exist.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name) if module.isascii() else None
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"loader: {path} cannot be imported ({error}); give a function as module.function") from error
    if not callable(found):
        raise UserError(f"loader: {path} is not a function; give one as module.function")
    return found
