"""The base class of backbones: raw input in, features out, divided into stages."""

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

from tl_modules.backbones.weights import (
    Pretrained,
    StateDict,
    is_local,
    linear_head,
    load_weights,
    read_weights,
    torchvision_names,
)
from tl_modules.batch import samples
from tl_modules.batch.protocol import BaseBackbone
from tl_modules.errors import UserError

__all__ = ["Backbone"]

PretrainedWeights = str | Path | None
CARRIED = "backbone._extra_state"  # its key in a module's checkpoint


# cached per module, since a method may need its state in every step
_bytes: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


class CarriesText(nn.Module):
    """Non-tensor data that a backbone needs, e.g. a tokenizer: stored in checkpoints as JSON in a byte tensor.

    It is loaded before the network's tensors, whose shapes may depend on it; also with `weights` of a run.

    Attributes:
        carried: The plain data; a property with a setter.
    """

    carried: Any

    def get_extra_state(self) -> Tensor:
        """Returns `carried` as bytes in a tensor, since readers of state dicts expect tensors."""
        if self not in _bytes:
            _bytes[self] = torch.frombuffer(bytearray(json.dumps(self.carried).encode()), dtype=torch.uint8)
        return _bytes[self]

    def set_extra_state(self, state: Tensor) -> None:
        """Sets `carried` from bytes."""
        self.carried = json.loads(state.cpu().numpy().tobytes())
        _bytes[self] = state.cpu()


class Backbone(BaseBackbone):
    """Maps raw samples to features, and owns every step in between: tokenising, padding, normalising, spectrograms.

    A subclass sets `out_features` and implements `forward` and `stages`; also `prepare`, if its inputs are more than
    tensors to be stacked.

    Attributes:
        prepare: Function from a list of raw inputs to a tree of them (see batch/samples.py), run in a loader's worker;
            small, so that it can be pickled.
        name: The architecture's name, for messages.
        model: The network that `load_pretrained` fills.
        classifier: The name in `model` of the classifier's last layer, which was removed.
        out_features: Width of the features; for a pyramid, of each level.
        pretrained: The source of the weights; None if they are random, or not from `load_pretrained`.
        random: Whether the weights are known to be random; a network that does not set it counts as pretrained.
        pruned: Whether pruning has made its layers smaller than its arguments say.
        closed: Number of stages, from the input, that no strategy unfreezes.
        data_defaults: Values for data arguments that are left open, e.g. the `image_size` that the weights were trained
            for.
        decided_by_schema: Arguments whose None is decided by the schema or a file; a run's config records the result.
        bf16_devices: Device types, of "cpu" and "cuda", on which it is faster in bfloat16 and as accurate.
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
        """Builds the parts that depend on the schema of the inputs; rejects inputs that it cannot read.

        Args:
            x: The schema of the inputs, e.g. {"image": {}} or {"numeric": ["age", "hours"]}; empty if unknown.
        """

    def refuse_others(self, x: Mapping[str, Any], kind: str, called: str, advice: str = "") -> None:
        """Rejects a schema of another kind of input.

        Raises:
            UserError: The schema names another kind; `called` is the kind that this backbone takes.
        """
        if x and kind not in x:
            name = type(self).__name__
            raise UserError(f"backbone: {name} takes {called}, but the data's inputs are {', '.join(x)}{advice}")

    def forward(self, x: Any) -> Any:
        """Maps prepared inputs to features, a tree with everything that a head needs, e.g. (B, out_features)."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Returns D of `pooled_features`."""
        return self.out_features if isinstance(self.out_features, int) else self.out_features[-1]

    def pooled_features(self, features: Any) -> Tensor:
        """Maps features to one vector per sample, (B, D): the mean over positions or time, of the last part."""
        if isinstance(features, samples.Padded):
            inside = features.mask.flatten(1)[..., None].to(features.values.dtype)  # (B, positions, 1)
            return (features.values.flatten(1, -2) * inside).sum(1) / inside.sum(1).clamp(min=1)
        if isinstance(features, Tensor):
            return features.flatten(2).mean(2) if features.ndim == 4 else features
        return self.pooled_features(list(features.values() if isinstance(features, dict) else features)[-1])

    def align(self, xs: list[Any]) -> list[Any]:
        """Converts the inputs of a step's domains to one form, so that they can pass as one batch."""
        return xs

    @abstractmethod
    def stages(self) -> list[nn.Module]:
        """Returns the parts from input to output; together they hold every parameter exactly once."""

    def load_pretrained(
        self,
        weights: PretrainedWeights,
        strict: bool,
        hub: Callable[[str], StateDict] | None = None,
        resized: Callable[[StateDict], StateDict] | None = None,
        prefix: str | None = None,
    ) -> None:
        """Fills `model` from a local file, a run, or what `hub` fetches for a name; None leaves it random.

        `resized` adapts tensors of another image size to the shapes of `model`; `prefix` precedes the file's names.

        Raises:
            UserError: The weights are not available or do not fit.
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
        if any(key.endswith("layer1.0.conv1.weight") for key in self.model.state_dict()):
            state = dict(torchvision_names(state))
        carried = state.pop(CARRIED, None)
        if carried is not None and isinstance(self, CarriesText):
            self.set_extra_state(carried)
        named = f"{kind} {self.name}".strip()
        given = replace(self.pretrained, state=state)
        report = load_weights(self.model, given, strict, named, resized, prefix, self.classifier)
        head = self.pretrained.head or linear_head(state, report.prefix + self.classifier)
        self.pretrained = replace(self.pretrained, state={}, head=head)  # the model holds the rest now
