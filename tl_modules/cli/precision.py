"""The default precision of a run."""

from __future__ import annotations

from typing import Any

import torch

from tl_modules.batch.compat import cpu_has_bf16


def on_gpu(accelerator: Any = "auto") -> bool:
    """Returns whether the Trainer uses a CUDA GPU, given its argument `accelerator`."""
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())


def best_precision(module: Any, accelerator: Any = "auto") -> str:
    """Returns bf16-mixed if device and backbone benefit, otherwise 32-true; the same in every run on a machine.

    Args:
        module: Its `backbone` lists in `bf16_devices` where bfloat16 is allowed; any other module stays in 32 bits.
        accelerator: As for the Trainer.
    """
    backbone = getattr(module, "backbone", None)
    gpu = on_gpu(accelerator)
    wanted = ("cuda" if gpu else "cpu") in getattr(backbone, "bf16_devices", ())
    if gpu:
        has = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = accelerator in ("auto", "cpu") and cpu_has_bf16()
    return "bf16-mixed" if has and wanted else "32-true"
