"""Encoders of Hugging Face for text.

    texts -> token numbers (in the loader's workers) -> embeddings -> layer 1 -> ... -> layer n -> pool
             Padded (B, L)                              stage 0       stage 1        stage n      (B, D)

No code of a model's repository is run, `trust_remote_code` is never passed on.
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

LONGEST = 512  # tokens of a window, where the encoder does not say itself


class Tokenise:
    """Makes token numbers of texts, Padded (B, L); small, so that it can be sent to a loader's worker.

    A text that is longer than a window becomes several of them, one after the other, each with its special tokens and
    all but the last full; what is beyond `windows` is left out.

    Attributes:
        tokenizer: A `tokenizers.Tokenizer`, which truncates to a window; None until a checkpoint brings it.
        windows: How many windows a text is read in at most.
    """

    def __init__(self, windows: int) -> None:
        self.tokenizer: Any = None
        self.windows = windows

    def __call__(self, texts: Sequence[str]) -> Padded:
        """Texts -> Padded (B, L) of whole numbers."""
        if self.tokenizer is None:
            raise UserError(
                "name: TransformerBackbone has no tokenizer, since its folder is gone; give --model.backbone.name "
                "FOLDER, or a run that holds it, --model.backbone.weights RUN"
            )
        rows = []
        for first in self.tokenizer.encode_batch([str(text) for text in texts]):
            windows = [first, *first.overflowing][: self.windows]
            ids = [number for window in windows for number in window.ids]
            rows.append(torch.tensor(ids or [0]))  # some tokenizers make nothing of an empty text
        return Padded.of(rows)


class TransformerBackbone(TextBackbone):
    """Any encoder of Hugging Face by a local folder or hub name; its features are one vector per token.

    A run's config.yaml holds the encoder's architecture and its checkpoints the tokenizer, so that a run needs neither
    folder nor hub again. Stages are the embeddings and each layer. A layer that only next-sentence prediction has
    trained, the pooler, is left out.

    Args:
        name: A folder as `save_pretrained` writes it, or a name on the hub, e.g. google-bert/bert-base-uncased.
        weights: DEFAULT takes those that belong to `name`; or a local file or a run of ours; None starts at random.
        strict: Refuse weights that lack a tensor or have one of another shape.
        pooling: How a text's vector is made of its tokens': their mean, the vector of the first one (`cls`), or a
            learnt weighted mean (`attention`), which trains with the last stage.
        max_length: Tokens of a window, special ones included; None takes as many as the encoder was made for.
        windows: How many windows a longer text is read in, each by itself; what is longer is cut off.
        architecture: The encoder's config in the words of Hugging Face; None reads it from `name`.

    Raises:
        UserError: transformers is missing, the encoder cannot be had or is none of transformers, or the weights do not
            fit.
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
        architecture: dict | None = None,  # type: ignore[type-arg]  # the parser would read its texts again
    ) -> None:
        super().__init__()
        try:
            from transformers import AutoConfig, AutoModel, AutoTokenizer
            from transformers.utils import logging
        except ImportError as error:
            raise UserError("TransformerBackbone needs transformers: pip install 'lightning-transfer[text]'") from error
        if windows < 1 or (max_length is not None and max_length < 3):
            raise UserError(f"windows, max_length: {windows} and {max_length} must be at least 1 and 3")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are processes already
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
        # a run's checkpoint brings its own, and need not find this one
        with suppress(UserError) if rebuilt else nullcontext():
            self._take_tokenizer(fetched(AutoTokenizer.from_pretrained, where, not rebuilt), longest)
        self.out_features = int(config.hidden_size)
        self.padding = int(getattr(config, "pad_token_id", None) or 0)
        self.first_only = pooling == "cls"
        pool = SequencePooling("attention" if pooling == "attention" else "mean", self.out_features)
        self.model.add_module("pool", pool)  # the last of its children, and so in the last stage

        def hub(entry: str) -> StateDict:
            return {**default_weights(entry, where, config), **pool.state_dict(prefix="pool.")}

        self.load_pretrained(weights, strict, hub)

    def _take_tokenizer(self, tokenizer: Any, longest: int) -> None:
        """Takes the fast part of a tokenizer, and sets what it truncates to."""
        fast = getattr(tokenizer, "backend_tokenizer", None)
        if fast is None:
            raise UserError(f"name: {self.name} has no fast tokenizer (tokenizer.json), which is needed here")
        numbers, known = fast.get_vocab(), self.model.get_input_embeddings().num_embeddings
        if numbers.keys() <= set(tokenizer.all_special_tokens):  # transformers makes one where there are no files of it
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
        """The tokenizer, with the length that it truncates to, and how many windows."""
        tokenizer = self.prepare.tokenizer
        return {"tokenizer": tokenizer and tokenizer.to_str(), "windows": self.prepare.windows}

    @carried.setter
    def carried(self, given: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        self.prepare.tokenizer = given["tokenizer"] and Tokenizer.from_str(given["tokenizer"])
        self.prepare.windows = given["windows"]

    def forward(self, x: Padded) -> Padded:
        """Token numbers, Padded (B, L) -> token features, Padded (B, L, D)."""
        if not isinstance(x, Padded):
            raise UserError("TransformerBackbone takes texts, and these inputs are none; take data such as TextFiles")
        inside = x.mask
        ids = x.values.masked_fill(~inside, self.padding)
        length, window = ids.shape[1], self.window
        if length <= window:
            return x.replace(self._features(ids, inside))
        missing = -length % window  # every window is a row of a batch; those beyond a text's end are left out
        ids, inside = F.pad(ids, (0, missing)).view(-1, window), F.pad(inside, (0, missing)).view(-1, window)
        there = inside[:, 0]
        found = self._features(ids[there], inside[there])
        features = found.new_zeros(len(ids), window, found.shape[-1])
        features[there] = found
        return x.replace(features.view(len(x), -1, found.shape[-1])[:, :length])

    @property
    def window(self) -> int:
        """How many tokens a window has."""
        tokenizer = self.prepare.tokenizer
        return int(tokenizer.truncation["max_length"]) if tokenizer is not None else LONGEST

    def _features(self, ids: Tensor, inside: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=ids, attention_mask=inside.long()).last_hidden_state
        return hidden

    def pooled_features(self, features: Any) -> Tensor:
        """Token features, Padded (B, L, D) -> (B, D), as `pooling` says; over all windows."""
        if self.first_only:
            window = self.window
            firsts = features.values[:, ::window]
            features = Padded(firsts, (features.lengths[:, None] + window - 1) // window)
        return super().pooled_features(features)

    def stages(self) -> list[nn.Module]:
        """The embeddings, and each layer; a learnt pooling belongs to the last one."""
        return layer_stages(self.model)
