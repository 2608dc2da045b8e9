"""What every backbone is: raw input in, features out, divided into stages."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tl_modules.backbones.weights import Pretrained, StateDict, is_local, linear_head, load_weights, read_weights
from tl_modules.batch import samples
from tl_modules.batch.protocol import BaseBackbone
from tl_modules.errors import UserError

__all__ = ["Backbone"]

PretrainedWeights = str | Path | None
CARRIED = "backbone._extra_state"  # the key in a checkpoint of a module


# of each module, since a method may ask for its state in every step
_bytes: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


class CarriesText(nn.Module):
    """What a backbone needs beside its tensors, e.g. a tokenizer: checkpoints carry it as JSON in a tensor of bytes.

    It comes before the tensors of the network, whose shapes may depend on it; also with `weights` of a run.

    Attributes:
        carried: Plain data, which is also set.
    """

    carried: Any

    def get_extra_state(self) -> Tensor:
        """`carried` as bytes; a tensor, since whatever reads a state dict expects such."""
        if self not in _bytes:
            _bytes[self] = torch.frombuffer(bytearray(json.dumps(self.carried).encode()), dtype=torch.uint8)
        return _bytes[self]

    def set_extra_state(self, state: Tensor) -> None:
        """Sets `carried`."""
        self.carried = json.loads(state.cpu().numpy().tobytes())
        _bytes[self] = state.cpu()


class Backbone(BaseBackbone):
    """Maps raw samples to features and owns all that lies between: tokenising, padding, normalising, spectrograms.

    A subclass sets `out_features` and writes `forward` and `stages`; `prepare` too if its inputs are more than tensors
    to be stacked.

    Attributes:
        prepare: A list of raw inputs -> a tree of them (see batch/samples.py), in a loader's worker; a small object,
            so that it can be sent there.
        name: Of the architecture, for messages.
        model: The network that `load_pretrained` fills.
        classifier: The name in `model` of the classifier's last layer, which was taken out.
        out_features: Width of the features; of a pyramid, of each level.
        pretrained: Where the weights came from; None if they are random, or not from `load_pretrained`.
        random: Whether the weights are known to start at random; a network that says nothing counts as pretrained.
        pruned: Whether its layers are smaller than its arguments say, as pruning has left them.
        closed: How many of its stages, from the input, no strategy opens.
        data_defaults: What arguments of the data are where they are left open, e.g. the `image_size` that the weights
            were trained for.
        decided_by_schema: The arguments whose None the schema or a file decides; a run's config has what they became.
        bf16_devices: The kinds of device, of "cpu" and "cuda", on which it is faster in bfloat16 and as accurate.
    """

    name: str = ""
    model: nn.Module
    classifier: str = ""
    out_features: int | list[int]
    prepare: Callable[[Sequence[Any]], Any] = staticmethod(samples.collate)
    pretrained: Pretrained | None = None
    random: bool = False
    pruned: bool = False
    closed: int = 0
    data_defaults: Mapping[str, Any] = {}
    decided_by_schema: tuple[str, ...] = ()
    bf16_devices: tuple[str, ...] = ()

    def bind_schema(self, x: Mapping[str, Any]) -> None:
        """Learns from the schema what inputs are: builds what depends on it, refuses what it cannot read.

        Args:
            x: The schema of the inputs, e.g. {"image": {}} or {"numeric": ["age", "hours"]}; empty if nobody knows.
        """

    def refuse_others(self, x: Mapping[str, Any], kind: str, called: str, advice: str = "") -> None:
        """Refuses a schema of inputs that are of another kind.

        Raises:
            UserError: The data says so; `called` is what this backbone takes instead.
        """
        if x and kind not in x:
            name = type(self).__name__
            raise UserError(f"backbone: {name} takes {called}, and the data's inputs are {', '.join(x)}{advice}")

    def forward(self, x: Any) -> Any:
        """Prepared inputs -> features, a tree that carries all that a head needs, e.g. (B, out_features)."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """D of `pooled_features`."""
        return self.out_features if isinstance(self.out_features, int) else self.out_features[-1]

    def pooled_features(self, features: Any) -> Tensor:
        """Features -> one vector per sample, (B, D): means over positions or time, of the last part of several."""
        if isinstance(features, samples.Padded):
            inside = features.mask.flatten(1)[..., None].to(features.values.dtype)  # (B, positions, 1)
            return (features.values.flatten(1, -2) * inside).sum(1) / inside.sum(1).clamp(min=1)
        if isinstance(features, Tensor):
            return features.flatten(2).mean(2) if features.ndim == 4 else features
        return self.pooled_features(list(features.values() if isinstance(features, dict) else features)[-1])

    def align(self, xs: list[Any]) -> list[Any]:
        """Brings the inputs of a step's domains into one form, so that they can pass as one batch."""
        return xs

    @abstractmethod
    def stages(self) -> list[nn.Module]:
        """The parts from input to output; together they hold every parameter exactly once."""

    def load_pretrained(
        self,
        weights: PretrainedWeights,
        strict: bool,
        hub: Callable[[str], StateDict] | None = None,
        resized: Callable[[StateDict], StateDict] | None = None,
        prefix: str | None = None,
    ) -> None:
        """Fills `model` from a local file, a run of ours, or what `hub` fetches for a name; None leaves it random.

        `resized` brings tensors of another image size into the shapes of `model`; `prefix` precedes the file's names.

        Raises:
            UserError: The weights cannot be had or do not fit.
        """
        self.random = weights is None
        if weights is None:
            return
        kind = type(self).__name__
        if is_local(weights):
            self.pretrained = read_weights(weights)
        elif hub is not None:
            self.pretrained = Pretrained(str(weights), hub(str(weights)))
        else:
            raise UserError(f"weights: {kind} has no hub entry {weights}; give a file or the directory of a run")
        self.pruned = self.pretrained.pruned
        state = dict(self.pretrained.state)
        carried = state.pop(CARRIED, None)
        if carried is not None and isinstance(self, CarriesText):
            self.set_extra_state(carried)
        named = f"{kind} {self.name}".strip()
        report = load_weights(self.model, replace(self.pretrained, state=state), strict, named, resized, prefix)
        head = self.pretrained.head or linear_head(state, report.prefix + self.classifier)
        self.pretrained = replace(self.pretrained, state={}, head=head)  # the model has the others now
