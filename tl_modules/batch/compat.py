"""Private names of Lightning, torch, jsonargparse and argparse: used here and nowhere else.

They can change with any release. `tests/batch/test_compat.py` says when each can be removed. Links are to GitHub:
Lightning-AI/pytorch-lightning, pytorch/pytorch, mauvilsa/jsonargparse, python/cpython.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer import call
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

# trees of arguments and outputs of any module (pytorch issue 65761)
from torch.utils import _pytree as pytree_

# modes that intercept every operation, for `tl benchmark`; no upstream issue known: torch/utils/_python_dispatch.py
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

pytree = pytree_
tree_leaves = pytree.tree_leaves

# the compiled version of a module's forward; no upstream issue known: torch/nn/modules/module.py
COMPILED = "_compiled_call_impl"


def is_compiled(module: Any) -> bool:
    """Returns whether `module.compile()` was called (torch/nn/modules/module.py)."""
    return getattr(module, COMPILED) is not None


def call_uncompiled(module: Any, *args: Any) -> Any:
    """Calls a module, with its hooks, as if it had not been compiled (torch/nn/modules/module.py)."""
    return module._call_impl(*args)


def times_written(tensor: Tensor) -> int:
    """Returns how often a tensor was modified in place; no upstream issue known: torch/_tensor.py."""
    return tensor._version


# base classes of layers of any dimension; no upstream issue known: torch/nn/modules/batchnorm.py, conv.py
BatchNorm = _BatchNorm
Convolution = _ConvNd


def tiny_inputs_in_float32(network: nn.Module) -> None:
    """Lets strided convolutions run in float32 on inputs so small that some weights see only padding.

    In bfloat16 on a CPU, oneDNN leaves the gradient of such weights uninitialised (no upstream issue known).
    """
    for layer in network.modules():
        if isinstance(layer, Convolution) and max(layer.stride) > 1 and _enter_float32 not in _hooks(layer):
            layer.register_forward_pre_hook(_enter_float32)
            layer.register_forward_hook(_leave_float32, always_call=True)


def _hooks(layer: nn.Module) -> list[Any]:
    return list(layer._forward_pre_hooks.values())


def _enter_float32(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    x = args[0]
    if x.device.type != "cpu" or not (torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()):
        return None
    sizes = x.shape[-len(layer.kernel_size) :]
    if not any(_sees_padding_only(layer, axis, size) for axis, size in enumerate(sizes)):
        return None
    layer.in_float32 = torch.autocast("cpu", enabled=False)
    layer.in_float32.__enter__()
    return (x.float(), *args[1:])


def _leave_float32(layer: Any, args: tuple[Any, ...], output: Any) -> None:
    if context := vars(layer).pop("in_float32", None):
        context.__exit__(None, None, None)


def _sees_padding_only(layer: Any, axis: int, size: int) -> bool:
    """Returns whether a weight of a convolution lies beyond an input of this size wherever the kernel is placed."""
    kernel, stride, dilation = layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis]
    padding = 0 if isinstance(layer.padding, str) else layer.padding[axis]
    last = size + 2 * padding - dilation * (kernel - 1)  # the starts of the kernel are below
    places = range(-padding, last - padding, stride)
    return any(all(not 0 <= place + tap * dilation < size for place in places) for tap in range(kernel))


# the state that an LRScheduler needs to continue; no upstream issue known: torch/optim/lr_scheduler.py
SCHEDULER_STATE = ("last_epoch", "base_lrs", "_step_count", "_last_lr")


def set_rates(scheduler: Any, rates: list[float]) -> None:
    """Sets the current rates, which a scheduler records only when it steps (torch/optim/lr_scheduler.py)."""
    scheduler._last_lr = rates
    for group, lr in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = lr


def storage_key(tensor: Tensor) -> int:
    """Identifies a storage, even an empty one, which has no address (no upstream issue known: torch/storage.py)."""
    return int(tensor.untyped_storage()._cdata)


def cpu_has_bf16() -> bool:
    """Returns whether this CPU computes in bfloat16; the public torch.cpu.get_capabilities is not in torch 2.6."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def attached(module: Any) -> bool:
    """Returns whether a LightningModule has a Trainer; `trainer` itself raises (Lightning pull request 13638)."""
    return module._trainer is not None


def finds_unused_parameters(ddp: Any) -> bool:
    """Returns the option of a DDPStrategy (no upstream issue known: src/lightning/pytorch/strategies/ddp.py)."""
    return bool(ddp._ddp_kwargs.get("find_unused_parameters"))


def synchronizes_batchnorm(strategy: Any) -> bool:
    """Returns whether --trainer.sync_batchnorm is set (no upstream issue known: .../strategies/parallel.py)."""
    return getattr(strategy, "_layer_sync", None) is not None


def average_of(callback: Any) -> Any:
    """Returns a WeightAveraging's AveragedModel, or None (requested in Lightning pull request 20545)."""
    return callback._average_model


@contextmanager
def import_policy_kept() -> Iterator[None]:
    """Undoes set_parsing_settings' import restrictions inside; there is no public way (jsonargparse pull 959)."""
    from jsonargparse._common import parsing_settings

    before = parsing_settings["import_path_verdicts"]
    try:
        yield
    finally:
        parsing_settings["import_path_verdicts"] = before


def name_classes_too(current: Callable[[str], str], used: Callable[[str, str], None]) -> None:
    """Lets configs use further names of classes (no upstream issue known: jsonargparse/_typehints.py).

    Args:
        current: Turns a further name, bare or with a module, into the class's name; a class of the first name wins.
        used: Is told both names whenever a further one is used.
    """
    from jsonargparse import _typehints

    resolve = _typehints.resolve_class_path_by_name

    def resolve_too(cls: Any, name: str) -> str:
        path = resolve(cls, name)
        own = resolve(cls, current(path))
        if own == path or "." not in own:
            return path
        used(*(one.rpartition(".")[2] for one in (path, own)))
        return own

    _typehints.resolve_class_path_by_name = resolve_too


# Command line


def options(parser: Any) -> list[str]:
    """Lists the options that an argparse parser knows (no upstream issue known: Lib/argparse.py)."""
    return list(parser._option_string_actions)


class OneCommand:
    """Mixed in before LightningCLI: adds arguments only to the requested command, since building them takes a second.

    The command line takes precedence over a checkpoint's hyper-parameters.
    No upstream issue known: src/lightning/pytorch/cli.py

    Attributes:
        command: The requested command; None lists the commands.
        helps: A one-sentence help text per command.
    """

    command: str | None
    helps: dict[str, str]

    def running(self) -> AbstractContextManager[None]:
        """Returns a context that is open while the command runs."""
        return nullcontext()

    def command_parser(self) -> Any:
        """Returns the command's own parser."""
        return cast(Any, self)._parser(cast(Any, self).subcommand)

    def _add_subcommands(self, parser: Any, **kwargs: Any) -> None:
        cli: Any = self
        commands, cli._subcommand_parsers = parser.add_subcommands(), {}
        for name in cli.subcommands():
            build = partial(cli._prepare_subcommand_parser, cli.trainer_class, name)
            made = (build if self.command else cli.init_parser)(description=self.helps[name])
            cli._subcommand_parsers[name] = made
            commands.add_subcommand(name, made, help=self.helps[name])

    def _parse_ckpt_path(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        with self.running():
            cast(Any, super())._run_subcommand(subcommand)


# Speed. Each saves more than 5 % of a step of 1.4 ms on cached features, batch 32 (benchmarks/overhead.py, 2 cores,
# torch 2.15, Lightning 2.6.6): calls per step times their cost, or the median of 14 pairs of runs.


class QuickNames:
    """Mixed in before LightningModule: Lightning sets the running hook 42 times a step, 2.4 us each in nn.Module: 7 %.

    No upstream issue known: src/lightning/pytorch/trainer/call.py
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class RunCheckpoint(ModelCheckpoint):
    """The callback of a run's best.ckpt or last.ckpt, whose state has its own name: a user's may monitor the same.

    Checkpoints of version 0.1 keep the state under the name that is common to all ModelCheckpoints (no upstream issue
    known: src/lightning/pytorch/trainer/call.py).
    """

    @property
    def state_key(self) -> str:
        """Returns the name of the state in a checkpoint."""
        return f"{type(self).__name__} {self.filename}"

    @property
    def _legacy_state_key(self) -> Any:
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)


def skip_graph_check(optimizer: Any) -> None:
    """Keeps Adam from querying the driver for a GPU in every step, 0.16 ms or 11 %, if everything is on the CPU.

    PyTorch pull request 172759 made it query accelerators other than CUDA.
    """
    optimizer._accelerator_graph_capture_health_check = lambda: None


STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class QuickHooks:
    """Mixed in before Trainer: a step's hooks call only callbacks that override them; Lightning calls all: 16 %.

    No upstream issue known: src/lightning/pytorch/trainer/call.py
    """

    def _run_stage(self) -> Any:
        with asked_only(cast(Trainer, self)):
            return cast(Any, super())._run_stage()


@contextmanager
def asked_only(trainer: Any) -> Iterator[None]:
    """Within the context, a step's hooks call only callbacks that override them, unless a profiler counts the calls."""
    everyone: Callable[..., Any] = call._call_callback_hooks
    having = {hook: [c for c in trainer.callbacks if _has(c, hook)] for hook in STEP_HOOKS}

    def some(owner: Any, hook_name: str, *args: Any, **kwargs: Any) -> None:
        if owner is not trainer or hook_name not in having or type(owner.profiler) is not PassThroughProfiler:
            everyone(owner, hook_name, *args, **kwargs)
            return
        module: LightningModule = trainer.lightning_module
        before, module._current_fx_name = module._current_fx_name, hook_name
        for callback in having[hook_name]:
            getattr(callback, hook_name)(trainer, module, *args, **kwargs)
        module._current_fx_name = before

    cast(Any, call)._call_callback_hooks = some
    try:
        yield
    finally:
        cast(Any, call)._call_callback_hooks = everyone


def _has(callback: Callback, hook: str) -> bool:
    return getattr(type(callback), hook) is not getattr(Callback, hook) or hook in vars(callback)
