"""How many stages are frozen for how long, and whether caching them pays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from lightning.pytorch import Trainer

from tl_modules.module import TransferModule

MANY = 1000
SLACK = 1.0  # seconds; a smaller loss is not worth an estimate
DISK = 5e8  # bytes per second, for an entry that does not fit in memory


def frozen_stages(trainer: Trainer, module: TransferModule, later: int = 0) -> int:
    """Counts the stages, from the input, that are still frozen in the last step of this epoch, or of one `later`."""
    strategy = module.finetuning
    now: float = trainer.current_epoch + later
    if trainer.state.fn != "fit" or module.at_end:
        now = strategy.last_position
    elif strategy.unit != "epochs":
        steps = trainer.estimated_stepping_batches  # also loads the training data
        each = trainer.num_training_batches / trainer.accumulate_grad_batches
        # what unfreezes after it is later
        now = strategy.last_position if each == math.inf else (now + 1) * math.ceil(each) - 1
        now = now / steps if strategy.unit == "fraction" else now
    trainable = strategy.open_stages(module, now)
    backbone = len(module.backbone.stages())  # the stages of a pretrained head are counted after these
    return min(trainable.start, backbone) if trainable else backbone


def epochs_ahead(trainer: Trainer, module: TransferModule) -> int:
    """Counts the epochs, including the current one, with the same stages frozen."""
    if trainer.state.fn != "fit":
        return MANY  # filling the entry is the evaluation itself
    frozen, left = frozen_stages(trainer, module), epochs_left(trainer)
    return next((n for n in range(1, left) if frozen_stages(trainer, module, n) != frozen), left)


def epochs_left(trainer: Trainer) -> int:
    """Counts the epochs left, including the current one."""
    end = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else MANY
    return max(1, end - trainer.current_epoch)


def share(limit: float | int | None, batches: int) -> float:
    """Returns the share of the data that an epoch sees."""
    if limit is None:
        return 1.0
    return limit if isinstance(limit, float) else min(1.0, limit / max(1, batches))


class Pace:
    """Seconds per sample, measured on a few batches.

    Attributes:
        seconds: Of each batch, for "read", "frozen" (the frozen part in an ordinary batch), "record" (the same, filling
            the entry), "write" and "take" (a batch from the entry).
        overlaps: Whether reading runs in parallel with training.
    """

    def __init__(self, overlaps: bool, clock: Callable[[], float] = perf_counter) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in ("read", "frozen", "record", "write", "take")}
        self.overlaps, self.clock = overlaps, clock

    @contextmanager
    def measure(self, name: str, samples: int) -> Iterator[None]:
        """Measures the time spent inside on this many samples."""
        start = self.clock()
        yield
        self.seconds[name].append((self.clock() - start) / samples)

    def saved(self, samples: int, passes: float, more: float = 0.0) -> float | None:
        """Estimates the seconds that an entry saves in total; negative if it costs more. None: nothing was measured.

        Args:
            samples: Number of samples.
            passes: How often each is read.
            more: Extra seconds per sample each time it is read.
        """
        if not all(self.seconds.values()):
            return None
        # the fastest batch: slower ones were delayed by something else
        read, frozen, record, write, take = (min(each) for each in self.seconds.values())
        each = frozen + (0 if self.overlaps else read) - take - more
        return samples * (passes * each - (read + record + write))


def pays(saved: float | None) -> bool:
    """Returns whether to build an entry: unless it clearly costs more than it saves."""
    return saved is None or saved > -SLACK
