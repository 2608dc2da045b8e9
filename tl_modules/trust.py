"""What a run's config may name: a copied run directory must not be able to run code of its sender's.

class_path: torch.optim.AdamW      fine: a class of a known package and of a kind that a run is made of
class_path: mine.MeanMatch         only with --trust mine
class_path: os.system              never: it is no class
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from typing import Any

from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tl_modules.errors import UserError
from tl_modules.finetuning.base import FineTuning
from tl_modules.schedules import Schedule

PACKAGES = ("tl_modules", "datamodules", "torch", "torchvision", "torchmetrics", "lightning", "timm")
KINDS = (nn.Module, FineTuning, Schedule, Optimizer, LRScheduler, LightningDataModule, Callback, Logger, Strategy,
         Precision, Profiler, CheckpointIO)  # fmt: skip
# these run what their arguments name
RUN_CODE = ("HubBackbone",)
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def check_names(config: Any, trusted: Sequence[str], where: str) -> None:
    """Refuses a config that names anything but classes that a run is made of, before any of it is imported.

    Args:
        config: Plain data.
        trusted: Modules and classes, and all below them, that the user vouches for.
        where: What messages call the config.

    Raises:
        UserError: It names something else.
    """
    for name, is_class in _names(config):
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in trusted):
            continue
        top, bare = name.partition(".")[0], name.rpartition(".")[2]
        if bare in RUN_CODE:
            raise UserError(
                f"{where} names {bare}, which runs code of a repository; if you trust it, pass --trust {name}"
            )
        if "." not in name or (not is_class and importlib.util.find_spec(top) is None):
            continue
        if top not in PACKAGES:
            raise UserError(
                f"{where} names {name}, which is none of ours; if it is yours or you trust it, pass --trust {top}"
            )
        if not _is_of_a_kind(name):
            raise UserError(f"{where} names {name}, which is no class that a run is made of")


def to_trust(config: Any) -> list[str]:
    """The modules that a config of one's own names and `check_names` would ask to trust."""
    tops = {name.partition(".")[0] for name, is_class in _names(config) if is_class}
    hub = {name for name, _ in _names(config) if name.rpartition(".")[2] in RUN_CODE}
    return sorted(tops - set(PACKAGES) | hub)


def _names(config: Any, is_class: bool = False) -> Iterator[tuple[str, bool]]:
    """Every text that could be taken for the name of a class or function."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _names(value, key == "class_path")
    elif isinstance(config, list):
        for value in config:
            yield from _names(value)
    elif isinstance(config, str) and (is_class or config in RUN_CODE or _DOTTED.fullmatch(config)):
        yield config, is_class


def _is_of_a_kind(name: str) -> bool:
    module, _, bare = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), bare)
    except (ImportError, AttributeError):
        return False
    return isinstance(found, type) and issubclass(found, KINDS)
