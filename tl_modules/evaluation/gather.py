"""Which loaders an evaluation reads."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def evaluated(trainer: Trainer) -> list[Any]:
    """The loaders of the validation, test or prediction that is under way, also where there is but one."""
    fn = trainer.state.fn
    given: Any = getattr(trainer, f"{fn.value}_dataloaders") if fn in ("test", "predict") else trainer.val_dataloaders
    return given if isinstance(given, list) else [given]
