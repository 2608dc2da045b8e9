"""How much of the backbone is frozen for how long, and whether caching it pays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from lightning.pytorch import Trainer

from tl_modules.module import TransferModule

MANY = 1000
SLACK = 1.0  # seconds; what loses less is not worth an estimate
DISK = 5e8  # bytes a second of an entry that does not fit in memory


def frozen_stages(trainer: Trainer, module: TransferModule, later: int = 0) -> int:
    """Counts the stages, from the input, still frozen in the last step of the present epoch, or of one `later`."""
    strategy = module.finetuning
    now: float = trainer.current_epoch + later
    if trainer.state.fn != "fit" or module.at_end:
        now = strategy.end
    elif strategy.unit != "epochs":
        steps = trainer.estimated_stepping_batches  # also loads the training data
        each = trainer.num_training_batches / trainer.accumulate_grad_batches
        now = strategy.end if each == math.inf else (now + 1) * math.ceil(each) - 1  # what opens after it is later
        now = now / steps if strategy.unit == "fraction" else now
    trainable = strategy.open_stages(module, now)
    backbone = len(module.backbone.stages())  # behind which the stages of a pretrained head are counted
    return min(trainable.start, backbone) if trainable else backbone


def epochs_ahead(trainer: Trainer, module: TransferModule) -> int:
    """Counts the epochs, from the present one on, that have the same stages frozen."""
    if trainer.state.fn != "fit":
        return MANY  # the pass that fills the entry is the evaluation itself
    frozen, left = frozen_stages(trainer, module), epochs_left(trainer)
    return next((n for n in range(1, left) if frozen_stages(trainer, module, n) != frozen), left)


def epochs_left(trainer: Trainer) -> int:
    """Counts the epochs from the present one on."""
    end = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else MANY
    return max(1, end - trainer.current_epoch)


def share(limit: float | int | None, batches: int) -> float:
    """Returns how much of the data an epoch sees."""
    if limit is None:
        return 1.0
    return limit if isinstance(limit, float) else min(1.0, limit / max(1, batches))


class Pace:
    """Seconds that a sample takes, measured on a few batches.

    Attributes:
        seconds: Of each batch, by "read", "frozen" (the frozen part in an ordinary batch), "record" (the same, filling
            the entry), "write" and "take" (a batch from the entry).
        overlaps: Whether reading goes on beside training.
    """

    def __init__(self, overlaps: bool, clock: Callable[[], float] = perf_counter) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in ("read", "frozen", "record", "write", "take")}
        self.overlaps, self.clock = overlaps, clock

    @contextmanager
    def measure(self, name: str, samples: int) -> Iterator[None]:
        """Measures what is done inside with so many samples."""
        start = self.clock()
        yield
        self.seconds[name].append((self.clock() - start) / samples)

    def saved(self, samples: int, passes: float, more: float = 0.0) -> float | None:
        """Estimates the seconds that an entry saves in all; negative where it costs more. None: nothing was measured.

        Args:
            samples: How many there are.
            passes: How often each is seen.
            more: Further seconds that a sample takes each time it is taken.
        """
        if not all(self.seconds.values()):
            return None
        # the fastest batch: the others were held up by something else
        read, frozen, record, write, take = (min(each) for each in self.seconds.values())
        each = frozen + (0 if self.overlaps else read) - take - more
        return samples * (passes * each - (read + record + write))


def pays(saved: float | None) -> bool:
    """Tells whether to build an entry: unless it clearly costs more than it saves."""
    return saved is None or saved > -SLACK
