r"""Small trainable layers beside frozen ones: LoRA and other adapters of peft.

    x --> [ W, frozen ] --> + --> y        y = W x + alpha / r B A x
     \--> [ A ] --> [ B ] -/               B starts at 0, so that the network is unchanged at first

peft (https://github.com/huggingface/peft) builds the layers; this file decides where they are, when they train, and how
they leave the network again: merged into the weights, or separately, in peft's own files.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from tl_modules.batch.protocol import BaseTransferModule
from tl_modules.errors import UserError, short
from tl_modules.finetuning.base import PART_LR, FineTuning
from tl_modules.finetuning.freezing import FullFineTuning

__all__ = ["LoRA"]

# common names of the projections to queries and values, the two that LoRA's authors adapt
QUERY_VALUE = ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "q", "v", "qkv", "query_key_value")
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)


class LoRA(FineTuning):
    """Trains the head and low-rank additions to frozen layers (Hu et al., ICLR 2022), or other adapters of peft.

    A run with it can be tested, resumed and used as a teacher like any other. `--model.checkpoint_weights trainable`
    saves only adapters and head; `tl compress` makes a run with merged weights; `save_adapters` writes peft's files.

    Args:
        r: Rank of the additions.
        alpha: The additions are scaled by alpha / r.
        dropout: Share of their inputs that is dropped in training.
        targets: The adapted layers, by the ends of their names, e.g. [query, value], or one regular expression for the
            whole name; "all-linear" is every linear layer. None: the attention's projections to queries and values; in
            networks without these every linear, convolutional and embedding layer.
        kind: The adapter, by peft's name: lora, loha, lokr, ia3, oft, boft, hra, ln_tuning, ... Adapters that share
            state between layers (vera) or lengthen the input (prefix_tuning) are rejected.
        options: Further arguments of peft's config of that adapter, e.g. {use_dora: true} or {use_rslora: true}.
        whole: Modules that train fully instead of getting adapters, by a consecutive part of their names, e.g.
            [parts.image], one of several backbones.
        opening: The strategy that decides which stages have adapters and when these train, e.g. LastStages or
            GradualUnfreezing; None: all, from the start.
        **kwargs: As for `FineTuning`.

    Raises:
        UserError: peft is missing, a number is out of range, or peft cannot adapt such layers.
    """

    pretrained_lr = PART_LR

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        targets: list[str] | str | None = None,
        kind: str = "lora",
        options: dict[str, Any] | None = None,
        whole: list[str] | None = None,
        opening: FineTuning | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if r < 1 or alpha <= 0 or not 0 <= dropout < 1:
            raise UserError(
                f"r, alpha, dropout: {r}, {alpha:g} and {dropout:g} must be at least 1, above 0, and in [0, 1)"
            )
        self.r, self.alpha, self.dropout, self.targets = r, alpha, dropout, targets
        self.kind, self.options, self.opening = kind.upper(), options or {}, opening or FullFineTuning()
        self.whole, self.unit = whole or [], self.opening.unit

    def trainable_stages(self, position: float, stages: int) -> range:
        """Returns the stages of `opening`."""
        return self.opening.trainable_stages(position, stages)

    def trains(self, name: str, owner: nn.Module) -> bool:
        """Returns whether `extend` has added the parameter, or its module trains fully."""
        return getattr(owner, "trains_beside", False)

    def extend(self, module: BaseTransferModule) -> None:
        """Adds adapters to the stages that will train.

        Raises:
            UserError: There is no such layer, or peft rejects it.
        """
        stages = module.stages()
        inside = {id(layer) for number in self.open_stages(module) for layer in stages[number].modules()}
        for part in (module.backbone, module.head):
            layers = {name: layer for name, layer in part.named_modules() if id(layer) in inside}
            for name in [n for n in layers if any(f".{own}." in f".{n}." for own in self.whole)]:
                layers.pop(name).trains_beside = True
            if names := self.chosen(layers):
                self._insert(part, names)

    def chosen(self, layers: dict[str, nn.Module]) -> list[str]:
        """Returns the names of the layers that get adapters.

        Raises:
            UserError: `targets` matches no layer.
        """
        within = {
            id(m) for layer in layers.values() if isinstance(layer, nn.MultiheadAttention) for m in layer.modules()
        }
        fit = {n: m for n, m in layers.items() if isinstance(m, nn.MultiheadAttention) or id(m) not in within}
        if self.targets is None:
            own = [n for n, m in fit.items() if isinstance(m, nn.MultiheadAttention) or n.split(".")[-1] in QUERY_VALUE]
            plain = [n for n, m in fit.items() if isinstance(m, LAYERS) and getattr(m, "groups", 1) == 1]
            return own or plain
        if self.targets == "all-linear":
            found = [n for n, m in fit.items() if isinstance(m, nn.Linear)]
        elif isinstance(self.targets, str):
            found = [n for n in layers if re.fullmatch(self.targets, n)]
        else:
            found = [n for n in layers if any(f".{n}".endswith(f".{end}") for end in self.targets)]
        if layers and not found:
            there = dict.fromkeys(n.split(".")[-1] for n, m in fit.items() if isinstance(m, LAYERS))
            raise UserError(f"targets: no layer is named {self.targets}; there are {short(there)}")
        return found

    def config(self, names: list[str]) -> Any:
        """Returns peft's config of adapters in layers with these names.

        Raises:
            UserError: peft is missing, or has no such adapter or option.
        """
        try:
            from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as KINDS
        except ImportError as error:
            raise UserError("finetuning: LoRA needs peft: pip install 'lightning-transfer[lora]'") from error
        kinds = {kind.value: config for kind, config in KINDS.items()}
        if self.kind not in kinds:
            raise UserError(f"kind: peft has no {self.kind.lower()}; it has {short(sorted(k.lower() for k in kinds))}")
        fields = {field.name for field in dataclasses.fields(kinds[self.kind])}
        given: dict[str, Any] = {"r": self.r, "target_modules": names, "feedforward_modules": []}
        given |= dict.fromkeys(("lora_alpha", "alpha"), self.alpha)
        given |= dict.fromkeys(("lora_dropout", "module_dropout"), self.dropout)
        try:
            return kinds[self.kind](**{k: v for k, v in given.items() if k in fields} | self.options)
        except (TypeError, ValueError) as error:
            raise UserError(f"options: peft's {self.kind.lower()} rejects them ({_first_line(error)})") from error

    def _insert(self, part: nn.Module, names: list[str]) -> None:
        config = self.config(names)
        from peft import inject_adapter_in_model

        known, before = {id(m) for m in part.modules()}, vars(part).get("peft_config")
        for layer in part.modules():
            if isinstance(layer, nn.TransformerEncoderLayer):
                layer.activation_relu_or_gelu = 0  # its fast path would bypass the adapters
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                inject_adapter_in_model(config, part)
        except (TypeError, ValueError, NotImplementedError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"finetuning: peft cannot put {self.kind.lower()} into {type(part).__name__} ({_first_line(error)}); "
                "use other targets, another kind, or other options"
            ) from error
        if before is None:
            vars(part).pop("peft_config", None)
        part.requires_grad_(True)  # peft froze what it did not add; `apply` decides what trains
        for layer in part.modules():
            if id(layer) not in known and next(layer.parameters(recurse=False), None) is not None:
                layer.trains_beside = True  # type: ignore[assignment]
            if id(layer) not in known and hasattr(layer, "unload_and_optionally_merge_module"):
                layer.register_forward_pre_hook(_note_weights)
                layer.register_forward_hook(_put_back_weights, always_call=True)

    def merge(self, module: BaseTransferModule) -> None:
        """Merges the adapters into the weights and removes them; outputs stay the same up to rounding."""
        for name, layer in list(adapter_layers(module)):
            parent, _, child = name.rpartition(".")
            if hasattr(layer, "unload_and_optionally_merge_module"):
                plain = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                layer.merge()
                plain = layer.get_base_layer()
            setattr(module.get_submodule(parent), child, plain)
            self.merged = True

    def save_adapters(self, network: nn.Module, folder: Path | str) -> None:
        """Writes the adapters of a network in peft's format: adapter_config.json and adapter_model.safetensors.

        `peft.PeftModel.from_pretrained(original_network, folder)` then equals this network.

        Args:
            network: The network that will be passed to peft, e.g. `module.backbone.model`.
            folder: The output folder; created if missing.

        Raises:
            UserError: The network has no adapter.
        """
        names = [name for name, _ in adapter_layers(network)]
        if not names:
            raise UserError(f"save_adapters: there is no adapter in {type(network).__name__}, or it was merged")
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        config, folder = self.config(names), Path(folder)
        network.peft_config = {"default": config}  # type: ignore[assignment]
        try:
            state = get_peft_model_state_dict(network)
        finally:
            del network.peft_config
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {f"base_model.model.{k}": v.contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors"
        )
        (folder / "adapter_config.json").write_text(json.dumps(_plain(config.to_dict()), indent=2) + "\n")


def adapter_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the outermost peft layers in a network, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    outer = None
    for name, layer in network.named_modules():
        if isinstance(layer, BaseTunerLayer) and not (outer and name.startswith(f"{outer}.")):
            outer = name
            yield name, layer


def _merging(layer: Any) -> list[tuple[nn.Module, str]]:
    """Returns the weights to which peft's attention adds its adapters, and subtracts them again, in each forward."""
    attention = layer.get_base_layer()
    return [(attention, "in_proj_weight"), (attention.out_proj.get_base_layer(), "weight")]


def _note_weights(layer: Any, *_: Any) -> None:
    layer.weights_before = [getattr(owner, name) for owner, name in _merging(layer)]


def _put_back_weights(layer: Any, *_: Any) -> None:
    """Restores the exact weights, which rounding would change slightly each time."""
    for (owner, name), weight in zip(_merging(layer), layer.weights_before, strict=True):
        delattr(owner, name)
        owner.register_parameter(name, weight)
    del layer.weights_before


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, set | tuple | list):
        return sorted(value) if isinstance(value, set) else [_plain(v) for v in value]
    return getattr(value, "value", value)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]
