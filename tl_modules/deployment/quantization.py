"""Post-training quantisation to int8: int8 weights with a scale for each output channel, by torchao."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tl_modules.batch.compat import Convolution
from tl_modules.checkpoints.compressed import Kind
from tl_modules.errors import UserError

__all__ = ["quantize"]

_WEIGHTED = (nn.Linear, Convolution)


def quantize(network: nn.Module, checkpoint: dict[str, Any], kind: Kind) -> None:
    """Stores a checkpoint's weights of convolutions and linear layers as int8, in place.

    A weight w of output channel c becomes round(w / s_c), s_c = max |w_c| / 127.5, a quarter of the bytes; biases,
    norms and statistics stay floats. "int8": weights become floats again when read, so that the network computes as
    before. "int8_dynamic": the linear layers also compute in int8, with inputs quantised on the fly (in `tl test`,
    `predict`, `benchmark` and `load_run`); a run that starts from it trains floats.

    Args:
        network: The network of the state dict.
        checkpoint: A checkpoint whose `state_dict` has floats.
        kind: "int8" or "int8_dynamic".

    Raises:
        UserError: torchao is missing, or there is no linear layer for "int8_dynamic".
    """
    try:
        from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine
    except ImportError as error:
        raise UserError("quantize: needs torchao: pip install 'lightning-transfer[compress]'") from error
    modules = {name: part for name, part in network.named_modules() if isinstance(part, _WEIGHTED)}
    if kind == "int8_dynamic" and not any(isinstance(part, nn.Linear) for part in modules.values()):
        raise UserError("quantize: int8_dynamic runs linear layers in int8, but this network has none; use int8")
    state = dict(checkpoint["state_dict"])
    scales: dict[str, Tensor] = {}
    for key in (f"{name}.weight" for name in modules):
        weight = state[key].float()
        block = (1, *weight.shape[1:])
        scale, zero = choose_qparams_affine(weight, MappingType.SYMMETRIC, block, torch.int8, eps=1e-12)
        state[key] = quantize_affine(weight, block, scale, zero, torch.int8)
        scales[key] = scale.flatten().float()
    checkpoint["state_dict"], checkpoint["quantized"] = state, {"kind": kind, "scales": scales}
