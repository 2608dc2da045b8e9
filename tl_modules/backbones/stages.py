"""Divides foreign networks: removes a classifier's last layer, and groups the rest into stages."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import nn


class Classifier(NamedTuple):
    """A classifier's former last layer: its name in the model, the layer, and the width of its input."""

    name: str
    layer: nn.Module
    in_features: int


def strip_classifier(model: nn.Module) -> Classifier | None:
    """Replaces a classifier's last layer by the identity, in place.

    Returns:
        The layer; None if the model has no `fc`, `classifier`, `head` or `heads` that holds one.
    """
    for name in ("fc", "classifier", "head", "heads"):
        top = getattr(model, name, None)
        if not isinstance(top, nn.Module):
            continue
        layers = [(n, m) for n, m in top.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        if not layers:
            continue
        path, last = layers[-1]
        full = f"{name}.{path}" if path else name
        parent, _, child = full.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
        return Classifier(full, last, last.in_features if isinstance(last, nn.Linear) else last.in_channels)
    return None


def suits_channels_last(model: nn.Module) -> bool:
    """Returns whether a network can use channels_last, which makes convolutions twice as fast, also on CPUs.

    Not with a 1 x 1 convolution of stride 2 and few channels, e.g. RepVGG's: its backward in oneDNN writes out of
    bounds, which kills the process (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """

    def fatal(layer: nn.Module) -> bool:
        if not isinstance(layer, nn.Conv2d) or layer.kernel_size != (1, 1) or max(layer.stride) == 1:
            return False
        return layer.groups == 1 and layer.in_channels < 16  # the block size of AVX-512

    return not any(map(fatal, model.modules()))


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the building blocks of a classifier in the order of their registration, one or two levels down."""
    for name, child in model.named_children():
        if isinstance(child, nn.Sequential | nn.ModuleList) or type(child).__name__ == "Encoder":
            for inner, block in child.named_children():
                if type(child).__name__ == "Encoder" and isinstance(block, nn.Sequential):
                    yield from ((f"{name}.{inner}.{n}", b) for n, b in block.named_children())
                else:
                    yield f"{name}.{inner}", block
        else:
            yield name, child


def _starts_stage(block: nn.Module) -> bool:
    """Returns whether a block lowers the resolution or is a transformer block."""

    def lowers(module: nn.Module) -> bool:
        if isinstance(module, nn.Conv2d):
            return max(module.stride) > 1
        return isinstance(module, nn.MaxPool2d | nn.AvgPool2d) and max(torch.tensor(module.stride).view(-1)) > 1

    name = type(block).__name__
    return name in ("EncoderBlock", "PatchMerging", "PatchMergingV2") or any(lowers(m) for m in block.modules())


def resolution_stages(model: nn.Module) -> list[nn.Module]:
    """Returns stages of a convolutional or transformer classifier; each block that lowers the resolution begins one."""
    index, group = 0, {}
    for number, (name, block) in enumerate(_blocks(model)):
        index += number > 0 and _starts_stage(block)
        group[name] = index
    return stages_by_name(model, group)


def stages_by_name(model: nn.Module, group: dict[str, int]) -> list[nn.Module]:
    """Collects a model's modules and loose parameters into stages.

    Args:
        model: The network.
        group: Stage number by the name of a module or parameter; anything below a name belongs to it, and anything
            without a name here belongs to the stage before it (loose parameters of the root: to the first).

    Returns:
        The stages that hold a parameter, sorted by number.
    """
    parts: dict[int, list[nn.Module]] = {}
    current = min(group.values(), default=0)

    def below(prefix: str) -> set[int]:
        return {g for name, g in group.items() if name == prefix or name.startswith(f"{prefix}.")}

    def collect(module: nn.Module, prefix: str) -> None:
        nonlocal current
        for name, parameter in module.named_parameters(prefix, recurse=False):
            parts.setdefault(group.get(name, current), []).append(nn.ParameterList([parameter]))
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            numbers = below(path)
            if len(numbers) > 1:
                collect(child, path)
            else:
                current = numbers.pop() if numbers else current
                parts.setdefault(current, []).append(child)

    collect(model, "")
    held: set[int] = set()
    for number in sorted(parts, reverse=True):  # shared parts belong to the deepest stage
        parts[number] = [part for module in parts[number] for part in _without(module, held)]
        held |= {id(p) for part in parts[number] for p in part.parameters()}
    stages: list[nn.Module] = [nn.ModuleList(parts[number]) for number in sorted(parts)]
    return [stage for stage in stages if next(stage.parameters(), None) is not None]


def _without(module: nn.Module, held: Collection[int]) -> Iterator[nn.Module]:
    """Yields a module, or those parts of it that hold none of these parameters."""
    if not any(id(p) in held for p in module.parameters()):
        yield module
        return
    loose = [p for p in module.parameters(recurse=False) if id(p) not in held]
    if loose:
        yield nn.ParameterList(loose)
    for child in module.children():
        yield from _without(child, held)


def layer_stages(model: nn.Module) -> list[nn.Module]:
    """Returns stages of an encoder: all before its largest list of layers, then each layer; the last with what follows.

    Raises:
        ValueError: It has no list of layers.
    """

    def weight(item: tuple[str, nn.Module]) -> int:
        return sum(p.numel() for p in item[1].parameters())

    name, layers = max(((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)), key=weight)
    return stages_by_name(model, {f"{name}.{number}": number + 1 for number in range(len(layers))} | {"": 0})
