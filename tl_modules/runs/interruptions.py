"""Saves a resumable checkpoint on signals, exceptions and non-finite losses, and within an epoch.

    SIGTERM, SIGINT    finish the step, save last.ckpt, exit with 143 / 130      a second one stops immediately
    SIGUSR1 on SLURM   the same, after `scontrol requeue`
    exception          save last.ckpt if it occurred between two steps; the error is shown unchanged
    loss not finite    stop; the last good checkpoint is kept

A step is finished if the optimizer has stepped and neither validation nor the epoch's end is due; these come first.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tl_modules.batch.compat import times_written
from tl_modules.errors import UserError
from tl_modules.module import TransferModule

__all__ = ["GracefulShutdown"]

log = logging.getLogger(__name__)
ELSEWHERE = "the loss is not finite in another process"
LOOK_EVERY = 10  # steps between two checks of the loss, each of which synchronises with the device


class GracefulShutdown(Callback):
    """Saves last.ckpt when it can be resumed exactly, whatever ends the run.

    Args:
        last: The checkpoint file.
        every: Also save after this many optimizer steps; None saves only at the end of epochs.
        resume_command: The command that resumes the run, for messages.
    """

    def __init__(
        self, last: Path, every: int | None = None, resume_command: str = "fit again with this checkpoint"
    ) -> None:
        if every is not None and every < 1:
            raise UserError(f"save_every_n_steps: {every} must be at least 1 step")
        self.last = last
        self.every = every
        self.resume_command = resume_command
        self.signal = 0
        self.in_step = False
        self.saved_at = 0
        self.before: dict[int, Any] = {}
        self.finite: dict[str, tuple[int, int]] = {}  # storage and write count of tensors at the last save
        self.group: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals from Lightning, which ends a SIGTERM with exit code 0."""
        self.saved_at = trainer.global_step
        if trainer.world_size > 1:  # flags are exchanged on the CPU, independent of the gradients
            self.group = torch.distributed.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            wanted = [signal.SIGTERM, signal.SIGINT]
            if "SLURM_JOB_ID" in os.environ:
                wanted.append(signal.SIGUSR1)
            self.before = {number: signal.signal(number, self._received) for number in wanted}

    def _received(self, number: int, frame: Any) -> None:
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number
        # not by logging, which this signal may have interrupted
        os.write(2, f"{signal.Signals(number).name}: saving after this step; signal again to stop at once\n".encode())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Marks the state as inexact: until the batch ends, a checkpoint would not be exactly resumable."""
        self.in_step = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops at a loss that is not finite; if the step is finished, saves if a signal or `every` requires it.

        Raises:
            UserError: The loss is not finite.
        """
        self.in_step = False
        if not _step_is_finished(trainer, batch_idx):
            return
        bad = not_finite(pl_module) if trainer.global_step % LOOK_EVERY == 0 else None
        number, wrong = self._agreed(self.signal, bad is not None)
        if wrong:
            raise UserError(f"{bad or ELSEWHERE}{self._advice()}")
        if number or (self.every is not None and trainer.global_step - self.saved_at >= self.every):
            self.saved_at = trainer.global_step
            trainer.save_checkpoint(self.last)
        if number:
            self._exit(trainer, number)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Prevents a bad checkpoint from replacing a good file.

        Raises:
            UserError: A loss or weight is not finite.
        """
        bad = not_finite(pl_module)
        floats = {name: t for name, t in checkpoint["state_dict"].items() if t.is_floating_point()}
        frozen = _frozen(pl_module)
        state = {name: (t.data_ptr(), times_written(t)) for name, t in floats.items() if name in frozen}
        unknown = [name for name in floats if name not in state or self.finite.get(name) != state[name]]
        checks = [floats[name].isfinite().all() for name in unknown]
        if bad is None and checks and not torch.stack(checks).all():
            name = next(name for name, fine in zip(unknown, checks, strict=True) if not fine)
            bad = f"step {trainer.global_step}: the weights of {name} are not finite"
        if self._agreed(0, bad is not None)[1]:
            raise UserError(f"{bad or ELSEWHERE}{self._advice()}")
        self.finite = state

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops on a signal that came while the last epoch ended; that end has been saved."""
        number, _ = self._agreed(self.signal, False)
        if number:
            self._exit(trainer, number)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ignores a signal at the end of the last epoch: nothing is left to stop."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves if the exception occurred between two steps, e.g. at an image that cannot be read."""
        self._restore()
        if isinstance(exception, SystemExit | UserError):
            return
        done = trainer.fit_loop.epoch_loop.batch_idx
        between = trainer.training and not self.in_step and done >= 0 and _step_is_finished(trainer, done)
        if between and trainer.world_size == 1:  # with several processes, waiting for the others could block
            try:
                trainer.save_checkpoint(self.last)
            except UserError as error:
                log.warning("%s", error)
        if self.last.is_file():
            log.warning("to resume: %s", self.resume_command)

    def _agreed(self, number: int, bad: bool) -> tuple[int, bool]:
        """Returns a signal that any process received, and whether any found a bad loss: all stop at the same step."""
        if self.group is None:
            return number, bad
        flags = torch.tensor([number, int(bad)])
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, self.group)
        return int(flags[0]), bool(flags[1])

    def _exit(self, trainer: Trainer, number: int) -> None:
        if trainer.is_global_zero:
            log.warning("stopped; to resume: %s", self.resume_command)
            if number == getattr(signal, "SIGUSR1", None):
                requeue()
        raise SystemExit(128 + number)

    def _advice(self) -> str:
        kept = f"; {self.last} is the last good checkpoint" if self.last.is_file() else ""
        return f"{kept}; lower the learning rate, or pass --trainer.gradient_clip_val 1"

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


def _step_is_finished(trainer: Trainer, batch_idx: int) -> bool:
    """Returns whether the optimizer has stepped, and neither a validation nor the epoch's end follows."""
    done = batch_idx + 1
    check = trainer.val_check_batch
    counted = done if trainer.check_val_every_n_epoch is not None else trainer.fit_loop.total_batch_idx + 1
    validates = isinstance(check, int) and trainer.limit_val_batches != 0 and counted % check == 0
    return done % trainer.accumulate_grad_batches == 0 and done < trainer.num_training_batches and not validates


def _frozen(module: LightningModule) -> set[str]:
    """Returns the names of what must not change now; a count of writes alone misses fused optimizers and BatchNorm."""
    if not isinstance(module, TransferModule):
        return set()
    return {name for named in module.finetuning.frozen_tensors(module).values() for name in named}


def not_finite(module: LightningModule) -> str | None:
    """Checks the epoch's loss terms, which waits for the device: returns which one is not finite, since which step."""
    found = module.terms.first_nonfinite() if isinstance(module, TransferModule) else None
    if found is None:
        return None
    steps, names = found
    terms = " and ".join(f"train/{name}" for name in names if name != "loss") or "train/loss"
    return f"epoch {module.current_epoch}, step {steps} of it: {terms} is not finite"


def requeue() -> None:
    """Asks SLURM to requeue this job."""
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ["SLURM_JOB_ID"]
    name = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else job
    done = subprocess.run(["scontrol", "requeue", name], check=False)
    if done.returncode:
        log.warning("scontrol requeue %s failed with code %d", name, done.returncode)
