"""The process of `tl`: its imports, output and exit code."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import NoReturn

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from datamodules.errors import printable
from tl_modules.errors import UserError, disk_full

log = logging.getLogger(__name__)


def first_process() -> bool:
    """Returns whether this is the only process or the first of several."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def stop(text: str) -> NoReturn:
    """Prints a text to standard error and exits with code 2."""
    if first_process():
        print(f"tl: error: {text}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def check_utf8(words: Sequence[str]) -> None:
    """Rejects arguments that a config could not hold.

    Raises:
        UserError: An argument is not UTF-8.
    """
    for word in words:
        if (shown := printable(word)) != word:
            raise UserError(f"{shown} is not UTF-8, so that config.yaml cannot hold it; rename it, or link to it")


def importable(own: bool) -> None:
    """Sets whether a config may name files in the working directory.

    The directory comes last, so that none of its files shadows a package; and if only a run's config is read, it is
    left out: whoever sent the run may also have sent the files.
    """
    sys.path[:] = [path for path in sys.path if path not in ("", os.getcwd())]
    if own:
        sys.path.append("")


def _without_full_disks(told: threading.ExceptHookArgs) -> None:
    if not disk_full(told.exc_value):  # TensorBoard raises it again in the main thread
        threading.__excepthook__(told)


def warn_of_load(trainer: Trainer) -> None:
    """Warns if other processes keep the cores busy, since threads that wait for each other are then slow."""
    busy, cores, threads = _load(), os.cpu_count() or 1, torch.get_num_threads()
    if first_process() and trainer.strategy.root_device.type == "cpu" and threads > 1 and busy > 0.75 * cores:
        log.warning(
            "load: other processes keep about %.1f of this machine's %d cores busy; OMP_NUM_THREADS=1 tl fit is likely "
            "to be faster than %d threads that wait for each other", busy, cores, threads,
        )  # fmt: skip


def _load() -> float:
    """Returns the number of other processes that were running or waiting in the last minute."""
    return os.getloadavg()[0] - 1 if hasattr(os, "getloadavg") else 0.0


def quiet() -> None:
    """Hides output that a user cannot act on: advertisements, hints about workers, verbose libraries."""
    threading.excepthook = _without_full_disks
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for package in ("tl_modules", "datamodules"):
        logging.getLogger(package).setLevel(logging.INFO if first_process() else logging.ERROR)
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's registrations are irrelevant
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    # a command on a run has other callbacks than `fit`, and a copied run another folder: both are intended
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec")
    told = "(Be aware that when using `ckpt_path`|The dirpath has changed|You're using the WeightAveraging callback)"
    warnings.filterwarnings("ignore", message=told)
