"""Finds the frozen part of a backbone, and records or replaces its calls in the ordinary forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tl_modules.backbones.base import Backbone
from tl_modules.batch.compat import call_uncompiled, pytree
from tl_modules.cache.leaves import CannotCut, equal, filled

Call = Callable[[], Any]


class FrozenCall(NamedTuple):
    """A call of a frozen module: its output, and the structure of that tree."""

    module: nn.Module
    leaves: list[Any]
    spec: Any


class Division(NamedTuple):
    """The frozen and the trainable part of a backbone.

    Attributes:
        frozen: The largest modules that hold nothing trainable.
        trainable: The largest modules that hold nothing frozen.
        loose: The trainable parameters directly in modules that hold both: the module and the parameter's name.
    """

    frozen: list[nn.Module]
    trainable: list[nn.Module]
    loose: list[tuple[nn.Module, str]]

    def may_train(self) -> set[int]:
        """Returns the ids of all modules and parameters that may train; recorded outputs do not depend on them."""
        return {id(m) for m in self.trainable} | {id(m.get_parameter(name)) for m, name in self.loose}


def divide(backbone: Backbone, closed: int) -> Division:
    """Divides a backbone whose first `closed` stages are frozen.

    Modules and parameters in no stage count as trainable, unless they set `in_no_stage = True`, and so do parameters
    shared with trainable modules.
    """
    stages = backbone.stages()
    resting = {id(p) for stage in stages[:closed] for p in stage.parameters()}
    moving = {id(p) for stage in stages[closed:] for p in stage.parameters()}
    moving |= {id(p) for p in backbone.parameters()} - resting
    awake = {id(m) for stage in stages[closed:] for m in stage.modules()}
    asleep = {id(m) for stage in stages[:closed] for m in stage.modules()} - awake
    asleep |= {id(m) for m in backbone.modules() if getattr(m, "in_no_stage", False)}
    frozen: dict[nn.Module, None] = {}
    trainable: dict[nn.Module, None] = {}
    loose: list[tuple[nn.Module, str]] = []

    def is_frozen(module: nn.Module) -> bool:
        if id(module) in awake or any(id(p) in moving for p in module.parameters()):
            return False
        children = list(module.children())
        return id(module) in asleep or (bool(children) and all(map(is_frozen, children)))

    def holds_frozen(module: nn.Module) -> bool:
        return is_frozen(module) or any(map(holds_frozen, module.children()))

    def walk(module: nn.Module) -> None:
        loose.extend((module, name) for name, p in module.named_parameters(recurse=False) if id(p) in moving)
        for child in module.children():
            has_no_forward = isinstance(child, nn.ModuleList | nn.ModuleDict)
            if is_frozen(child) and not has_no_forward:
                frozen[child] = None
            elif has_no_forward or holds_frozen(child):
                walk(child)
            else:
                trainable[child] = None

    walk(backbone)
    return Division(list(frozen), list(trainable), loose)


def forward(backbone: nn.Module, x: Any) -> Any:
    """Runs the backbone itself, not its compiled version, which would bypass patched forwards."""
    return call_uncompiled(backbone, x)


def run(backbone: nn.Module, division: Division, x: Any, on_call: Callable[[nn.Module, Call], Any]) -> Any:
    """Runs the ordinary forward, in which `on_call` replaces the calls of the frozen modules."""
    inside = False

    def patch(module: nn.Module) -> Callable[..., Any]:
        real = module.forward

        def answering(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:  # a frozen module calls another
                return real(*args, **kwargs)
            inside = True
            output = on_call(module, partial(real, *args, **kwargs))
            inside = False
            return output

        return answering

    with patched({module: patch(module) for module in division.frozen}):
        return forward(backbone, x)


def record_calls(backbone: nn.Module, division: Division, x: Any) -> list[FrozenCall]:
    """Lists the calls of the frozen modules and their outputs."""
    calls: list[FrozenCall] = []

    def on_call(module: nn.Module, call: Call) -> Any:
        output = call()
        leaves, spec = pytree.tree_flatten(output)
        calls.append(FrozenCall(module, [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec))
        return output

    run(backbone, division, x, on_call)
    return calls


def depends_on_trainable(backbone: nn.Module, division: Division, x: Any, calls: list[FrozenCall]) -> list[bool]:
    """Returns which calls depend on trainable modules, by replacing all outputs of these with NaN.

    Raises:
        CannotCut: The forward does not run with NaN, or calls other modules.
    """

    def ruin(tensor: Any) -> Tensor:
        return filled(tensor, tensor.shape)

    def ruined(module: nn.Module) -> Callable[..., Any]:
        real = module.forward
        return lambda *args, **kwargs: pytree.tree_map_only(Tensor, ruin, real(*args, **kwargs))

    kept = [module.get_parameter(name) for module, name in division.loose]
    try:
        for module, name in division.loose:
            setattr(module, name, nn.Parameter(ruin(module.get_parameter(name)), requires_grad=False))
        with patched({module: ruined(module) for module in division.trainable}):
            again = record_calls(backbone, division, x)
    except Exception as error:  # a foreign forward may raise anything on NaN
        raise CannotCut(f"its forward does not run on placeholders ({str(error).splitlines()[0][:80]})") from error
    finally:
        for (module, name), parameter in zip(division.loose, kept, strict=True):
            setattr(module, name, parameter)
    if [call.module for call in calls] != [call.module for call in again]:
        raise CannotCut("which of its frozen modules run depends on outputs of trainable ones")
    return [not equal(one.leaves, other.leaves) for one, other in zip(calls, again, strict=True)]


@contextmanager
def patched(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Temporarily replaces the forwards of modules."""
    before = [vars(module).get("forward") for module in forwards]
    for module, other in forwards.items():
        vars(module)["forward"] = other
    try:
        yield
    finally:
        for module, own in zip(forwards, before, strict=True):
            if own is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Keeps a module in eval mode, and restores the mode of each of its modules on exit."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes.items():
            each.training = mode


@contextmanager
def generator_kept(device: torch.device) -> Iterator[None]:
    """Restores the random generators of CPU and device on exit."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
