"""Which validation of a run was the best one so far."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer


def monitor_of(module: LightningModule) -> tuple[str, str]:
    """The metric that chooses the model, and "min" or "max"."""
    monitor: tuple[str, str] = getattr(module, "monitor", ("val/loss", "min"))
    return monitor


def floats(trainer: Trainer, prefix: str = "") -> dict[str, float]:
    """The latest metrics whose names begin with `prefix`."""
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(prefix)}


class Best:
    """The validation metrics of the epoch that best.ckpt holds."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def improved(self, trainer: Trainer, module: LightningModule) -> bool:
        """Takes the validation that has just ended, if it is better than all before."""
        name, mode = monitor_of(module)
        now = floats(trainer, "val/")
        if trainer.sanity_checking or name not in now:
            return False
        sign = 1 if mode == "max" else -1
        if self.metrics and sign * now[name] <= sign * self.metrics[name]:
            return False
        self.metrics = now | {"epoch": float(trainer.current_epoch)}
        return True
