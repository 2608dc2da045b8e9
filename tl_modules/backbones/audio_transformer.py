"""Encoders of Hugging Face for recordings: wav2vec2, HuBERT, WavLM, Whisper, AST and their kin.

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

# what an encoder drops and hides by itself in its container's forward, where freezing does not reach
CALM = {"layerdrop": 0.0, "encoder_layerdrop": 0.0, "apply_spec_augment": False, "mask_time_prob": 0.0,
        "mask_feature_prob": 0.0}  # fmt: skip


@dataclass(frozen=True)
class Extract(Resample):
    """Resamples, and makes of each recording by itself what the encoder's feature extractor makes of it.

    Args:
        extractor: Of Hugging Face.
    """

    extractor: Any = None

    def __call__(self, waves: Sequence[Any]) -> Any:
        """Waveforms (T,) -> Padded (B, T), or {"spectrogram": (B, ...), "samples": (B,)}."""
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
    """Any encoder of Hugging Face for recordings; its features are one vector per frame, or, of AST, per recording.

    A run's config.yaml holds the encoder's architecture and its feature extractor, so that a run needs neither folder
    nor hub again. Recordings are resampled to the rate that it was trained on. What Hugging
    Face drops and hides in training by itself (LayerDrop, SpecAugment) is off. No code of a model's repository is run.

    Args:
        name: A folder as `save_pretrained` writes it, or a name on the hub, e.g. facebook/wav2vec2-base.
        weights: DEFAULT takes those that belong to `name`; or a local file or a run of ours; None starts at random.
        strict: Refuse weights that lack a tensor or have one of another shape.
        architecture: The encoder's config in the words of Hugging Face; None reads it from `name`.
        extractor: Likewise that of its feature extractor.

    Raises:
        UserError: transformers is missing, the encoder cannot be had or takes no recordings, or the weights do not fit.
    """

    decided_by_schema = ("architecture", "extractor")
    bf16_devices = ("cuda", "cpu")

    def __init__(
        self,
        name: Path | str,
        weights: PretrainedWeights = "DEFAULT",
        strict: bool = True,
        architecture: dict | None = None,  # type: ignore[type-arg]  # the parser would read its texts again
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
            raise UserError(f"name: {name} is no encoder of recordings; TransformerBackbone takes encoders of text")
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
        """Resamples to the encoder's rate."""
        super().bind_schema(x)
        self.prepare = Extract(self.prepare.rate, self.prepare.wanted, self.extract)

    def forward(self, x: Any) -> Any:
        """What `Extract` gives -> frames, Padded (B, L, D), or (B, D)."""
        if isinstance(x, Padded):
            return self._frames(x)
        if not isinstance(x, dict):
            raise UserError(
                "AudioTransformer takes recordings, and these inputs are none; take data such as AudioFolders"
            )
        output = self.model(x["spectrogram"])
        if getattr(output, "pooler_output", None) is not None:
            return output.pooler_output
        hidden = output.last_hidden_state
        whole = self.extract.n_samples / hidden.shape[1]  # samples of a frame; what lies behind the end is silence
        lengths = (x["samples"] / whole).ceil().long().clamp(1, hidden.shape[1])
        return Padded(hidden[:, : int(lengths.max())], lengths[:, None])

    def _frames(self, x: Padded) -> Padded:
        """Waveforms, Padded (B, T) -> Padded (B, L, D), where a frame lies within its recording."""
        lengths, field, step = x.lengths, 1, 1
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            lengths, field, step = (lengths - kernel) // stride + 1, field + (kernel - 1) * step, step * stride
        waves = F.pad(x.values, (0, max(0, field - x.values.shape[1])))
        within = x.lengths.clamp(min=field)[:, None]  # also of recordings that are too short for one frame
        norms = [module for module in self.model.modules() if isinstance(module, RecordingNorm)]
        for norm in norms:
            norm.lengths = (x.lengths - self.config.conv_kernel[0]) // self.config.conv_stride[0] + 1
        inside = torch.arange(waves.shape[1], device=waves.device) < within
        hidden = self.model(waves, attention_mask=inside.long()).last_hidden_state
        for norm in norms:
            norm.lengths = None
        return x.replace(hidden, lengths.clamp(min=1))

    def stages(self) -> list[nn.Module]:
        """What comes before the layers, and each layer."""
        return layer_stages(self.model)


class RecordingNorm(nn.Module):
    """GroupNorm of one channel a group over a recording's own frames, without the padding behind its end.

    wav2vec2-base and its like see the padding otherwise, and what they say of a recording depends on its batch.

    Attributes:
        lengths: How many frames each recording has, (B,), while a batch passes.

    Args:
        norm: Whose weight, bias and epsilon it takes.
    """

    lengths: Tensor | None = None

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, frames: Tensor) -> Tensor:
        """(B, C, L) -> (B, C, L)."""
        assert self.lengths is not None
        inside = torch.arange(frames.shape[2], device=frames.device) < self.lengths.clamp(min=1)[:, None, None]
        count = inside.sum(2, keepdim=True)
        centred = frames - (frames * inside).sum(2, keepdim=True) / count
        variance = (centred.square() * inside).sum(2, keepdim=True) / count
        return centred * (variance + self.eps).rsqrt() * self.weight[:, None] + self.bias[:, None]
