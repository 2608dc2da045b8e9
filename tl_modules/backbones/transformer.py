"""Hugging Face encoders for texts.

    texts -> token numbers (in the loader's workers) -> embeddings -> layer 1 -> ... -> layer n -> pool
             Padded (B, L)                              stage 0       stage 1        stage n      (B, D)

Code in a model's repository is never run: `trust_remote_code` is not passed on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tl_modules.backbones.base import PretrainedWeights
from tl_modules.backbones.hugging_face import (
    architecture_of,
    default_weights,
    encoder_of,
    fetched,
    folder_or_name,
    positions,
)
from tl_modules.backbones.pooling import SequencePooling
from tl_modules.backbones.stages import layer_stages
from tl_modules.backbones.text import TextBackbone
from tl_modules.backbones.weights import StateDict
from tl_modules.batch.samples import Padded
from tl_modules.errors import UserError

__all__ = ["TransformerBackbone"]

LONGEST = 512  # tokens of a window, if the encoder's config does not limit it


class Tokenise:
    """Converts texts to token numbers, Padded (B, L); small, so that it can be pickled for a loader's worker.

    A text longer than a window is divided into several consecutive windows, each with its special tokens and all but
    the last full; anything beyond `windows` is cut off.

    Attributes:
        tokenizer: A `tokenizers.Tokenizer`, which truncates to a window; None until loaded from a checkpoint.
        windows: Maximum number of windows per text.
    """

    def __init__(self, windows: int) -> None:
        self.tokenizer: Any = None
        self.windows = windows

    def __call__(self, texts: Sequence[str]) -> Padded:
        """Maps texts to Padded (B, L) of integers."""
        if self.tokenizer is None:
            raise UserError(
                "name: TransformerBackbone has no tokenizer, since its folder is gone; pass --model.backbone.name "
                "FOLDER, or a run that contains it, --model.backbone.weights RUN"
            )
        rows = []
        for first in self.tokenizer.encode_batch([str(text) for text in texts]):
            windows = [first, *first.overflowing][: self.windows]
            ids = [number for window in windows for number in window.ids]
            rows.append(torch.tensor(ids or [0]))  # some tokenizers return no tokens for an empty text
        return Padded.of(rows)


class TransformerBackbone(TextBackbone):
    """Any Hugging Face text encoder by local folder or hub name; its features are one vector per token.

    A run's config.yaml holds the encoder's architecture and its checkpoints the tokenizer, so that a run needs neither
    folder nor hub again. Stages are the embeddings and each layer. The pooler, which only next-sentence prediction has
    trained, is left out.

    Args:
        name: A folder written by `save_pretrained`, or a name on the hub, e.g. google-bert/bert-base-uncased.
        weights: DEFAULT takes the weights of `name`; or a local file or a run of `tl fit`; None starts at random.
        strict: Rejects weights that lack a tensor, have one of another shape, or have further blocks.
        pooling: How a text's vector is computed from its tokens' vectors: their mean, the vector of the first one
            (`cls`), or a learnt weighted mean (`attention`), which trains with the last stage.
        max_length: Tokens of a window, including special ones; None takes the encoder's maximum.
        windows: How many windows a longer text is divided into, each encoded separately; the rest is cut off.
        architecture: The encoder's Hugging Face config; None reads it from `name`.

    Raises:
        UserError: transformers is missing, the encoder is not available or not part of transformers, or the weights do
            not fit.
    """

    prepare: Tokenise
    decided_by_schema = ("architecture",)
    bf16_devices = ("cuda", "cpu")

    def __init__(
        self,
        name: Path | str,
        weights: PretrainedWeights = "DEFAULT",
        strict: bool = True,
        pooling: Literal["mean", "cls", "attention"] = "mean",
        max_length: int | None = None,
        windows: int = 1,
        architecture: dict | None = None,  # type: ignore[type-arg]  # the parser would re-read its texts
    ) -> None:
        super().__init__()
        try:
            from transformers import AutoConfig, AutoModel, AutoTokenizer
            from transformers.utils import logging
        except ImportError as error:
            raise UserError("TransformerBackbone needs transformers: pip install 'lightning-transfer[text]'") from error
        if windows < 1 or (max_length is not None and max_length < 3):
            raise UserError(f"windows, max_length: {windows} and {max_length} must be at least 1 and 3")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are already processes
        logging.disable_progress_bar()
        self.name, self.prepare = str(name), Tokenise(windows)
        where = folder_or_name(name)
        rebuilt = architecture is not None and weights != "DEFAULT"
        if architecture is None:
            architecture = architecture_of(where)
        self.architecture = architecture
        config = AutoConfig.for_model(**architecture)
        self.model = encoder_of(AutoModel.from_config(config, dtype=torch.float32))
        most = positions(self.model) or getattr(config, "max_position_embeddings", None) or LONGEST
        if max_length is not None and max_length > most and not rebuilt:
            raise UserError(f"max_length: {name} takes {most} tokens, fewer than {max_length}; windows read more")
        longest = max_length or min(most, LONGEST)
        # a run's checkpoint contains its own, and must not depend on this one
        with suppress(UserError) if rebuilt else nullcontext():
            self._take_tokenizer(fetched(AutoTokenizer.from_pretrained, where, not rebuilt), longest)
        self.out_features = int(config.hidden_size)
        self.padding = int(getattr(config, "pad_token_id", None) or 0)
        self.first_only = pooling == "cls"
        pool = SequencePooling("attention" if pooling == "attention" else "mean", self.out_features)
        self.model.add_module("pool", pool)  # the last child, and so in the last stage

        def hub(entry: str) -> StateDict:
            return {**default_weights(entry, where, config), **pool.state_dict(prefix="pool.")}

        self.load_pretrained(weights, strict, hub)

    def _take_tokenizer(self, tokenizer: Any, longest: int) -> None:
        """Takes the fast tokenizer inside, and sets its truncation."""
        fast = getattr(tokenizer, "backend_tokenizer", None)
        if fast is None:
            raise UserError(f"name: {self.name} has no fast tokenizer (tokenizer.json), which is required")
        numbers, known = fast.get_vocab(), self.model.get_input_embeddings().num_embeddings
        if numbers.keys() <= set(tokenizer.all_special_tokens):  # made up, without files
            raise UserError(f"name: {self.name} has no tokenizer; tokenizer.save_pretrained(FOLDER) puts it there")
        if (last := max(numbers.values())) >= known:
            raise UserError(
                f"name: the tokens of {self.name} have numbers up to {last}, and its encoder embeds {known}; save it "
                "again after model.resize_token_embeddings(len(tokenizer))"
            )
        fast.no_padding()
        fast.enable_truncation(min(longest, tokenizer.model_max_length))
        self.prepare.tokenizer = fast

    @property
    def carried(self) -> dict[str, Any]:
        """The tokenizer, with its truncation length, and the number of windows."""
        tokenizer = self.prepare.tokenizer
        return {"tokenizer": tokenizer and tokenizer.to_str(), "windows": self.prepare.windows}

    @carried.setter
    def carried(self, given: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        self.prepare.tokenizer = given["tokenizer"] and Tokenizer.from_str(given["tokenizer"])
        self.prepare.windows = given["windows"]

    def forward(self, x: Padded) -> Padded:
        """Maps token numbers, Padded (B, L), to token features, Padded (B, L, D)."""
        if not isinstance(x, Padded):
            raise UserError("TransformerBackbone takes texts, but the inputs are not; use data such as TextFiles")
        inside = x.mask
        ids = x.values.masked_fill(~inside, self.padding)
        length, window = ids.shape[1], self.window
        if length <= window:
            return x.replace(self._features(ids, inside))
        missing = -length % window  # every window is a row; those after a text's end are left out
        ids, inside = F.pad(ids, (0, missing)).view(-1, window), F.pad(inside, (0, missing)).view(-1, window)
        there = inside[:, 0]
        found = self._features(ids[there], inside[there])
        features = found.new_zeros(len(ids), window, found.shape[-1])
        features[there] = found
        return x.replace(features.view(len(x), -1, found.shape[-1])[:, :length])

    @property
    def window(self) -> int:
        """Number of tokens in a window."""
        tokenizer = self.prepare.tokenizer
        return int(tokenizer.truncation["max_length"]) if tokenizer is not None else LONGEST

    def _features(self, ids: Tensor, inside: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=ids, attention_mask=inside.long()).last_hidden_state
        return hidden

    def pooled_features(self, features: Any) -> Tensor:
        """Pools token features, Padded (B, L, D), to (B, D), by `pooling`; over all windows."""
        if self.first_only:
            window = self.window
            firsts = features.values[:, ::window]
            features = Padded(firsts, (features.lengths[:, None] + window - 1) // window)
        return super().pooled_features(features)

    def stages(self) -> list[nn.Module]:
        """Returns the embeddings, and each layer; a learnt pooling belongs to the last one."""
        return layer_stages(self.model)
