"""The format of compressed checkpoints, and how a network loads them.

    pruned: true                           the network's layers have the sizes of the tensors: `fit_shapes`
    quantized: {kind, scales: {key: s}}    the tensor at key is int8, and means key * s: `dequantized`

Both are plain data and tensors, so that loading unpickles nothing; architecture and config are those of the original.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tl_modules.batch.compat import BatchNorm
from tl_modules.errors import UserError

Kind = Literal["int8", "int8_dynamic"]
_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def fit_shapes(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Resizes a network's tensors to the shapes in a state dict, in place, and its layers accordingly.

    Resized tensors are uninitialised: load the state dict next. Tensors that it lacks are not changed.

    Args:
        network: Any network of convolutions, linear layers and norms; the parameters stay the same objects.
        state: Tensors by their names in the network.
    """
    for name, module in network.named_modules():
        changed = False
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            given = state.get(f"{name}.{key}" if name else key)
            if given is not None and given.shape != tensor.shape:
                tensor.data = torch.empty_like(given, dtype=tensor.dtype, device=tensor.device)
                changed = True
        if changed:
            _resize(module)


def _resize(module: nn.Module) -> None:
    """Sets a layer's size attributes from its weight."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, _Conv):
        if module.groups == module.in_channels == module.out_channels:  # depthwise
            module.groups = len(weight)
        module.out_channels, module.in_channels = len(weight), weight.shape[1] * module.groups
    elif isinstance(module, _Transposed):
        module.in_channels, module.out_channels = len(weight), weight.shape[1] * module.groups
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(weight)
    elif isinstance(module, BatchNorm):
        module.num_features = len(next(t for t in (weight, module.running_mean) if t is not None))


def dequantized(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Converts a checkpoint's int8 tensors to floats; other contents are kept.

    Raises:
        UserError: The scales do not match the int8 tensors.
    """
    if not checkpoint.get("quantized"):
        return checkpoint
    try:
        state = dict(checkpoint["state_dict"])
        for key, scale in checkpoint["quantized"]["scales"].items():
            state[key] = state[key] * scale.view(-1, *[1] * (state[key].ndim - 1))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError("checkpoint: its int8 tensors do not match the scales in `quantized`") from error
    return checkpoint | {"state_dict": state}


def run_dynamic(network: nn.Module) -> None:
    """Makes torchao run the linear layers in int8, with inputs quantised on the fly; for inference.

    Raises:
        UserError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise UserError("int8_dynamic needs torchao: pip install 'lightning-transfer[compress]'") from error
    quantize_(network, Int8DynamicActivationInt8WeightConfig())
