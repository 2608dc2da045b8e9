"""Backbones for recordings: a small network of ours, image networks on spectrograms, modules of others.

    waveforms, Padded (B, T) -> bands of frames -> stage 0 -> stage 1 -> ... -> frames, Padded (B, L, D) -> mean

What lies behind a recording's end is silence to each of them: neither the batch nor its padding changes its features.
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
    """Takes waveforms of any length; the base of every backbone for recordings.

    Args:
        rate: Samples a second that the network takes, to which data of another rate are resampled; None is the data's.
    """

    prepare: Resample = Resample()
    decided_by_schema: tuple[str, ...] = ("rate",)

    def __init__(self, rate: int | None = None) -> None:
        super().__init__()
        if rate is not None and rate < 1:
            raise UserError(f"rate: {rate} must be at least 1 sample a second")
        self.rate = rate

    def bind_schema(self, x: Mapping[str, Any]) -> None:
        """Takes over the data's rate, or resamples to its own.

        Raises:
            UserError: The inputs are no recordings; nobody knows the rate; soxr is missing where it is needed.
        """
        kind = type(self).__name__
        self.refuse_others(x, "audio", "recordings")
        given = (x.get("audio") or {}).get("rate")
        rate = self.rate or given
        if rate is None:
            raise UserError(f"rate: the data does not say how many samples a second it has; give {kind} its rate")
        self.rate, self.prepare = rate, Resample(given or rate, rate)
        if given not in (None, rate):
            try:
                import soxr  # noqa: F401
            except ImportError as error:
                raise UserError("resampling needs soxr: pip install 'lightning-transfer[audio]'") from error
            log.info("recordings are resampled from %d to %d Hz, which %s takes", given, rate, kind)
        self.build(rate)

    def build(self, rate: int) -> None:
        """Makes what depends on the rate, once that is known."""


class FrameBackbone(AudioBackbone):
    """Waveforms -> bands of frames -> a network; what ours and those for images have in common."""

    def __init__(self, rate: int | None, mels: int, masks: int) -> None:
        super().__init__(rate)
        self.mels, self.standardise, self.augment = mels, Standardised(), SpecAugment(masks)

    def build(self, rate: int) -> None:
        """Makes the front end."""
        self.log_mel = LogMel(rate, self.mels)

    def bands(self, x: Padded) -> Padded:
        """Waveforms, Padded (B, T) -> standardised bands, Padded (B, L, mels)."""
        if not hasattr(self, "log_mel"):
            self.bind_schema({})
        if not isinstance(x, Padded):
            raise UserError(
                f"{type(self).__name__} takes recordings, and these inputs are none; take data such as AudioFolders"
            )
        lengths = self.log_mel.frames(x.lengths)
        frames = x.replace(self.log_mel(x.values), lengths)
        return x.replace(self.augment(self.standardise(frames.values, frames.mask), lengths), lengths)


class ConvBlock(nn.Module):
    """Two convolutions over time with LayerNorm, around which the input is carried.

    Args:
        inputs: Channels that it takes.
        outputs: Channels that it gives.
        kernel: Frames of a convolution, an odd number.
        stride: Frames from one to the next.
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
        """(B, L, inputs), and 1 where a recording is, 0 elsewhere (B, L, 1) -> (B, ceil(L / stride), outputs)."""
        shorter = inside[:, :: self.stride]
        h = self.first((frames * inside).transpose(1, 2)).transpose(1, 2)
        h = self.dropout(self.norms[0](h).relu()) * shorter
        h = self.norms[1](self.second(h.transpose(1, 2)).transpose(1, 2))
        return cast(Tensor, (h + self.carry(frames[:, :: self.stride])).relu())


class SpeechConvNet(FrameBackbone):
    """A small network of ours for words and short sounds: residual convolutions over the time of log-mel bands.

    After TC-ResNet (Choi et al., Interspeech 2019), with LayerNorm of each frame in place of BatchNorm, which would see
    the padding. 0.5 million parameters.

    Args:
        width: Channels of the first stage; the last of three has twice as many.
        kernel: Frames of a convolution, an odd number.
        dropout: Within the blocks.
        masks: How many stretches of time and of frequency `SpecAugment` hides in training.
        mels: How many bands.
        rate: Samples a second; None is the data's.
        weights: A local file or a run of ours; None starts at random.
        strict: Refuse weights that lack a tensor or have one of another shape.
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
        """Waveforms, Padded (B, T) -> frames, Padded (B, L, out_features), 40 ms each."""
        x = self.bands(x)
        for block in self.model.children():
            values = block(x.values, x.mask[..., None].to(x.values.dtype))
            x = x.replace(values, -(-x.lengths // cast(ConvBlock, block).stride))
        return x

    def stages(self) -> list[nn.Module]:
        """The blocks; SpecAugment belongs to the first."""
        first, *others = self.model.children()
        return [nn.ModuleList([self.augment, first]), *others]


class Spectrogram(FrameBackbone):
    """Any image backbone on log-mel spectrograms, (1, mels, frames), of which all recordings have equally many.

    Args:
        backbone: The image backbone; one whose size is fixed, e.g. a ViT, needs `image_size`.
        seconds: How much of a recording is seen: of a longer one the middle, a shorter one is filled up at its end.
        image_size: Side in pixels to which spectrograms are scaled; None leaves them as they are.
        masks: How many stretches of time and of frequency `SpecAugment` hides in training.
        mels: How many bands.
        rate: Samples a second; None is the data's.

    Raises:
        UserError: The backbone takes no images, or a length is not above 0.
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
            raise UserError(f"backbone: Spectrogram takes an image backbone, and {type(backbone).__name__} is none")
        self.inner, self.seconds, self.image_size = backbone, seconds, image_size
        self.out_features, self.name = backbone.out_features, backbone.name
        self.random, self.pruned, self.bf16_devices = backbone.random, backbone.pruned, backbone.bf16_devices

    def forward(self, x: Padded) -> Any:
        """Waveforms, Padded (B, T) -> what the image backbone gives for (B, 1, mels, frames) in [0, 1]."""
        bands, frames = self.bands(x), self.log_mel.frames(round(self.seconds * cast(int, self.rate)))
        begin = (bands.lengths - frames).clamp(min=0) // 2
        places = begin[:, None] + torch.arange(frames, device=begin.device)
        there = (places < bands.lengths[:, None])[..., None]
        places = places.clamp(max=bands.values.shape[1] - 1)
        cut = bands.values.gather(1, places[..., None].expand(-1, -1, self.mels)) * there
        images = (cut / 8 + 0.5).clamp(0, 1).transpose(1, 2)[:, None]  # 4 deviations up and down
        if self.image_size is not None:
            images = F.interpolate(images, (self.image_size,) * 2, mode="bilinear", antialias=True)
        return self.inner(images)

    def pooled_features(self, features: Any) -> Tensor:
        """As the image backbone's."""
        return self.inner.pooled_features(features)

    def stages(self) -> list[nn.Module]:
        """Those of the image backbone; SpecAugment belongs to the first."""
        first, *others = self.inner.stages()
        return [nn.ModuleList([self.augment, first]), *others]


class TorchBackbone(AudioBackbone):
    """Any torch module for waveforms, from a function of yours. **A run that names it runs your code**: `--trust mine`.

    The module's forward takes waveforms (B, T) and gives (B, D), or frames (B, L, D), which are averaged. Recordings
    are passed to it one by one, unless it takes a second argument: then it is given waveforms filled up with zeros
    and their lengths (B,), and gives frames and their lengths.

    Args:
        loader: The function, module.function; what it returns counts as pretrained.
        arguments: Passed to it by name, e.g. {weights: FILE}.
        rate: Samples a second that the module takes; None is the data's.
        weights: A local file or a run of ours; None keeps what the loader gives.
        strict: Refuse weights that lack a tensor or have one of another shape.

    Raises:
        UserError: There is no such function, it gives no module, or the weights do not fit.
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
            raise UserError(f"loader: {loader} gives a {type(model).__name__}, not a torch.nn.Module")
        self.name, takes = loader, inspect.signature(model.forward).parameters.values()
        self.model = model if sum(p.default is p.empty for p in takes) > 1 else OneByOne(model)
        self.load_pretrained(weights, strict)
        self.random = False

    def build(self, rate: int) -> None:
        """Finds the width of the features, by a second of noise."""
        with torch.no_grad():
            mode = self.training
            features = self.eval()(Padded.of([torch.rand(rate) - 0.5]))
            self.train(mode)
        self.out_features = features.shape[-1] if isinstance(features, Tensor) else features.values.shape[-1]

    def forward(self, x: Padded) -> Any:
        """Waveforms, Padded (B, T) -> (B, D), or frames, Padded (B, L, D)."""
        features, lengths = self.model(x.values, x.lengths)
        return features if lengths is None else x.replace(features, lengths)

    def stages(self) -> list[nn.Module]:
        """The module's children that hold parameters, those of lists and sequences one by one."""
        network = self.model.inner if isinstance(self.model, OneByOne) else self.model
        names = []
        for name, child in network.named_children():
            several = isinstance(child, nn.Sequential | nn.ModuleList)
            names += [f"{name}.{inner}" for inner, _ in child.named_children()] if several else [name]
        return stages_by_name(network, {name: number for number, name in enumerate(names)})


class OneByOne(nn.Module):
    """Runs a module on each recording alone, so that it sees no padding.

    Args:
        inner: (1, T) -> (1, D) or (1, L, D).
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, T) and (B,) -> (B, D) and None, or frames (B, L, D) and their lengths (B,)."""
        found = [self.inner(wave[None, :length])[0] for wave, length in zip(waves, lengths.tolist(), strict=True)]
        if found[0].ndim == 1:
            return torch.stack(found), None
        frames = nn.utils.rnn.pad_sequence(found, batch_first=True)
        return frames, torch.tensor([len(each) for each in found], device=waves.device)


def imported(path: str) -> Any:
    """The function of a dotted name, which a run may name only if it is trusted (`runs/trust.py`).

    Raises:
        UserError: There is no such function.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name) if module.isascii() else None
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"loader: {path} cannot be imported ({error}); name a function as module.function") from error
    if not callable(found):
        raise UserError(f"loader: {path} is no function; name one as module.function")
    return found
