"""Hugging Face encoders for recordings: wav2vec2, HuBERT, WavLM, Whisper, AST and similar.

waveforms -> the encoder's own feature extractor (in the loader's workers) -> convolutions -> layer 1 -> ... -> layer n
             waveforms, Padded (B, T), or spectrograms (B, ...)               stage 0         stage 1        stage n
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tl_modules.backbones.audio import AudioBackbone
from tl_modules.backbones.audio_frontend import Resample
from tl_modules.backbones.base import PretrainedWeights
from tl_modules.backbones.hugging_face import architecture_of, default_weights, encoder_of, fetched, folder_or_name
from tl_modules.backbones.stages import layer_stages
from tl_modules.batch.samples import Padded
from tl_modules.errors import UserError

__all__ = ["AudioTransformer"]

# dropout and masking in the forward of the encoder's container, which freezing does not reach
CALM = {"layerdrop": 0.0, "encoder_layerdrop": 0.0, "apply_spec_augment": False, "mask_time_prob": 0.0,
        "mask_feature_prob": 0.0}  # fmt: skip


@dataclass(frozen=True)
class Extract(Resample):
    """Resamples recordings and applies the encoder's feature extractor to each one separately.

    Args:
        extractor: A feature extractor of Hugging Face.
    """

    extractor: Any = None

    def __call__(self, waves: Sequence[Any]) -> Any:
        """Converts waveforms (T,) to Padded (B, T), or {"spectrogram": (B, ...), "samples": (B,)}."""
        name = self.extractor.model_input_names[0]
        rows = [self.one(torch.as_tensor(wave, dtype=torch.float32)) for wave in waves]
        found = [
            torch.as_tensor(self.extractor(row.numpy(), sampling_rate=self.wanted, return_tensors="np")[name][0])
            for row in rows
        ]
        if found[0].ndim == 1:
            return Padded.of(found)
        return {"spectrogram": torch.stack(found), "samples": torch.tensor([len(row) for row in rows])}


class AudioTransformer(AudioBackbone):
    """Any Hugging Face encoder for recordings; its features are one vector per frame, or, for AST, per recording.

    A run's config.yaml holds the encoder's architecture and its feature extractor, so that a run needs neither folder
    nor hub again. Recordings are resampled to the rate of its training data. Hugging Face's own random dropping and
    masking in training (LayerDrop, SpecAugment) is off. Code in a model's repository is never run.

    Args:
        name: A folder written by `save_pretrained`, or a name on the hub, e.g. facebook/wav2vec2-base.
        weights: DEFAULT takes the weights of `name`; or a local file or a run of `tl fit`; None starts at random.
        strict: Rejects weights that lack a tensor, have one of another shape, or have further blocks.
        architecture: The encoder's Hugging Face config; None reads it from `name`.
        extractor: The config of its feature extractor; None reads it from `name`.

    Raises:
        UserError: transformers is missing, the encoder is not available or not for recordings, or the weights do not
            fit.
    """

    decided_by_schema = ("architecture", "extractor")
    bf16_devices = ("cuda", "cpu")

    def __init__(
        self,
        name: Path | str,
        weights: PretrainedWeights = "DEFAULT",
        strict: bool = True,
        architecture: dict | None = None,  # type: ignore[type-arg]  # the parser would re-read its texts
        extractor: dict | None = None,  # type: ignore[type-arg]
    ) -> None:
        super().__init__()
        try:
            import transformers
        except ImportError as error:
            raise UserError("AudioTransformer needs transformers: pip install 'lightning-transfer[text]'") from error
        self.name, where = str(name), folder_or_name(name)
        if architecture is None:
            architecture = architecture_of(where)
        if extractor is None:
            extractor = json.loads(fetched(transformers.AutoFeatureExtractor.from_pretrained, where).to_json_string())
        self.architecture, self.extractor = architecture, extractor
        config = transformers.AutoConfig.for_model(**architecture)
        config.update({key: value for key, value in CALM.items() if hasattr(config, key)})
        kind = getattr(transformers, str(extractor.get("feature_extractor_type")), None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.SequenceFeatureExtractor)):
            raise UserError(f"name: {name} is not an encoder of recordings; TransformerBackbone takes encoders of text")
        self.extract: Any = kind(**extractor)
        self.rate = int(self.extract.sampling_rate)
        self.config = config
        self.model = encoder_of(transformers.AutoModel.from_config(config, dtype=torch.float32))
        for layer in getattr(getattr(self.model, "feature_extractor", None), "conv_layers", ()):
            if isinstance(getattr(layer, "layer_norm", None), nn.GroupNorm):
                layer.layer_norm = RecordingNorm(layer.layer_norm)
        self.out_features = int(config.hidden_size)
        self.load_pretrained(weights, strict, lambda entry: default_weights(entry, where, config))

    def bind_schema(self, x: Any) -> None:
        """Sets up resampling to the encoder's rate."""
        super().bind_schema(x)
        self.prepare = Extract(self.prepare.rate, self.prepare.wanted, self.extract)

    def forward(self, x: Any) -> Any:
        """Maps the output of `Extract` to frames, Padded (B, L, D), or to (B, D)."""
        if isinstance(x, Padded):
            return self._frames(x)
        if not isinstance(x, dict):
            raise UserError("AudioTransformer takes recordings, but the inputs are not; use data such as AudioFolders")
        output = self.model(x["spectrogram"])
        if getattr(output, "pooler_output", None) is not None:
            return output.pooler_output
        hidden = output.last_hidden_state
        whole = self.extract.n_samples / hidden.shape[1]  # samples per frame; frames after the end are padding
        lengths = (x["samples"] / whole).ceil().long().clamp(1, hidden.shape[1])
        return Padded(hidden[:, : int(lengths.max())], lengths[:, None])

    def _frames(self, x: Padded) -> Padded:
        """Maps waveforms, Padded (B, T), to Padded (B, L, D), with the frames inside each recording."""
        lengths, field, step = x.lengths, 1, 1
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            lengths, field, step = (lengths - kernel) // stride + 1, field + (kernel - 1) * step, step * stride
        waves = F.pad(x.values, (0, max(0, field - x.values.shape[1])))
        within = x.lengths.clamp(min=field)[:, None]  # recordings too short for one frame get one
        norms = [module for module in self.model.modules() if isinstance(module, RecordingNorm)]
        for norm in norms:
            norm.lengths = (x.lengths - self.config.conv_kernel[0]) // self.config.conv_stride[0] + 1
        inside = torch.arange(waves.shape[1], device=waves.device) < within
        hidden = self.model(waves, attention_mask=inside.long()).last_hidden_state
        for norm in norms:
            norm.lengths = None
        return x.replace(hidden, lengths.clamp(min=1))

    def stages(self) -> list[nn.Module]:
        """Returns the part before the layers, and each layer."""
        return layer_stages(self.model)


class RecordingNorm(nn.Module):
    """GroupNorm with one channel per group over a recording's own frames, without the padding after its end.

    wav2vec2-base and similar networks would see the padding otherwise, and a recording's output would depend on its
    batch.

    Attributes:
        lengths: The number of frames of each recording, (B,), set while a batch passes.

    Args:
        norm: The GroupNorm whose weight, bias and epsilon it takes.
    """

    lengths: Tensor | None = None

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, frames: Tensor) -> Tensor:
        """Normalises (B, C, L)."""
        assert self.lengths is not None
        inside = torch.arange(frames.shape[2], device=frames.device) < self.lengths.clamp(min=1)[:, None, None]
        count = inside.sum(2, keepdim=True)
        centred = frames - (frames * inside).sum(2, keepdim=True) / count
        variance = (centred.square() * inside).sum(2, keepdim=True) / count
        return centred * (variance + self.eps).rsqrt() * self.weight[:, None] + self.bias[:, None]
