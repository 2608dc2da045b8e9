"""Which precision a run takes where none is asked for."""

from __future__ import annotations

from typing import Any

import torch

from tl_modules.batch.compat import cpu_has_bf16


def on_gpu(accelerator: Any = "auto") -> bool:
    """Whether the Trainer takes a GPU of CUDA, for its argument `accelerator`."""
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())


def best_precision(module: Any, accelerator: Any = "auto") -> str:
    """bf16-mixed where device and backbone gain by it, otherwise 32-true; the same in every run on a machine.

    Args:
        module: Has a `backbone` that says in `bf16_devices` whether it may; anything else stays in 32 bits.
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
