"""What a run's config may name: opening a run directory from somebody else must not execute their code.

    class_path: torch.optim.AdamW                    allowed: a class of a kind that a run is made of
    class_path: mine.MeanMatch                       only with --trust mine
    class_path: lightning.pytorch.loggers.CSVLogger  only with --trust: it writes where its arguments say
    methods: '[{class_path: ...}]'                   never: the parser would take the text apart once more

`check_config` checks a config before it is parsed, for clear messages, and again after parsing, where nothing can hide
in texts or in files inside texts. During parsing, `imports_only` restricts imports to what is allowed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tl_modules.batch.compat import import_policy_kept
from tl_modules.errors import UserError
from tl_modules.finetuning.base import FineTuning
from tl_modules.methods.schedules import WeightSchedule
from tl_modules.runs.renamed import current_class

# modules that a run may import from: their classes neither write files nor run what their arguments name
ALLOWED = (
    "tl_modules", "datamodules", "torch.nn", "torch.optim", "torchvision.transforms", "torchvision.ops", "timm.layers",
    "timm.optim", "lightning.pytorch.callbacks", "lightning.pytorch.strategies", "lightning.pytorch.plugins",
    "lightning.pytorch.cli.ReduceLROnPlateau",
)  # fmt: skip
KINDS = (nn.Module, FineTuning, WeightSchedule, Optimizer, LRScheduler, LightningDataModule, Precision)
# of these packages, only some modules are harmless
HARMLESS = {
    "AdaBN", "DDPStrategy", "DeviceStatsMonitor", "EMAWeightAveraging", "EarlyStopping",
    "GradientAccumulationScheduler", "LearningRateMonitor", "MCDropout", "ModelCheckpoint", "ModelSummary",
    "RichModelSummary", "RichProgressBar", "SingleDeviceStrategy", "StochasticWeightAveraging", "T3A", "TENT",
    "TQDMProgressBar", "Timer", "WeightAveraging",
}  # fmt: skip
RUN_CODE = ("TorchHubBackbone",)  # of the repository in their arguments
FILES = ("dirpath", "filename")  # arguments that let a ModelCheckpoint write outside the run's directory
TEXTS = (
    "name",
    "class_names",
    "classes",
    "categories",
    "columns",
    "schema",
)  # arguments whose texts are names chosen by the user
SCHEMAS = ("columns", "schema")  # everything in them is such a name, except classes
DEEPEST, MOST = 50, 200_000  # limits on levels and values of a config
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def check_config(config: Any, trusted: Sequence[str], where: str) -> None:
    """Rejects a config that names anything except classes that a run is made of, before any of it is imported.

    Args:
        config: Plain data.
        trusted: Modules and classes, with everything below them, that the user trusts.
        where: The config's name for messages.

    Raises:
        UserError: It names something else.
    """
    for name, reason in _refused(config):
        if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in trusted):
            advice = f"; if it is yours or you trust it, pass --trust {_vouched(name)}" if name else ""
            raise UserError(f"{where} {reason}{advice}")


def to_trust(config: Any) -> list[str]:
    """Returns the modules and classes in your own config that `check_config` would require to be trusted."""
    return sorted({_vouched(name) for name, _ in _refused(config) if name})


@contextmanager
def imports_only(trusted: Sequence[str]) -> Iterator[None]:
    """Restricts the parser's imports to what a run may name and what is trusted.

    Raises:
        UserError: A trusted name is not that of a module or class.
    """
    with import_policy_kept():
        try:
            set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*ALLOWED, *trusted])
        except ValueError as error:
            raise UserError(f"trust: {','.join(trusted)} is not a list of modules or classes ({error})") from error
        yield


def check_links(run: Path) -> None:
    """Rejects a run directory with a link that leads out of it, through which a command would write elsewhere.

    Raises:
        UserError: There is such a link.
    """
    home = run.resolve()
    for folder, folders, files in os.walk(run):
        for path in (Path(folder, name) for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                raise UserError(
                    f"run: {path} is a link to {path.resolve()}, outside the run, where commands would write; "
                    "replace it by the file itself (cp -RL copies a run that way)"
                )


def _refused(config: Any) -> Iterator[tuple[str, str]]:
    """Yields what a config must not contain: the name to trust, or "" if that does not help; and why, as a clause."""
    for key, value, owner in leaves(config):
        if key in FILES and value is not None and owner.endswith("ModelCheckpoint"):
            yield owner, f"lets {owner} write to {value}"
        if not isinstance(value, str) or key in TEXTS + FILES:
            continue
        value = current_class(value)
        if _holds_structure(value):
            yield "", f"has a mapping or list as text in {key}: {value[:60]}; a run's own config has none"
        is_class = key.rpartition(".")[2] == "class_path"
        if is_class or value in RUN_CODE or _DOTTED.fullmatch(value):
            reason = _reason(value, is_class)
            if reason:
                yield value, reason


def leaves(config: Any) -> Iterator[tuple[str, Any, str]]:
    """Yields every value that is not a mapping or list: its key, the value, and the class whose argument it is.

    Raises:
        UserError: The config contains itself, or its aliases expand without limit.
    """
    stack: list[tuple[str, Any, str, int]] = [("", config, "", 0)]
    for _ in range(MOST):
        if not stack:
            return
        key, value, owner, depth = stack.pop()
        if depth > DEEPEST:
            break
        if isinstance(value, dict):
            inner = str(value.get("class_path", "")) or owner
            names = ((str(k), v) for k, v in value.items())
            stack += [(key if key in SCHEMAS and k != "class_path" else k, v, inner, depth + 1) for k, v in names]
        elif isinstance(value, list | tuple):
            stack += [(key, v, owner, depth + 1) for v in value]
        else:
            yield key, value, owner
    raise UserError("run: its config is nested too deeply for that of a run")


@functools.lru_cache(MOST)  # values of a config repeat
def _holds_structure(text: str) -> bool:
    """Returns whether a text is YAML of a mapping or list with content, or of such a text."""
    for _ in range(DEEPEST):
        try:
            parsed = yaml.safe_load(text)
        except yaml.YAMLError:
            return False
        if not isinstance(parsed, str) or parsed == text:
            return isinstance(parsed, dict | list) and parsed not in ([], {}, [None])  # a gap may be written "-"
        text = parsed
    return True


def _reason(name: str, is_class: bool) -> str | None:
    """Returns why a config must not name this, or None."""
    top, bare = name.partition(".")[0], name.rpartition(".")[2]
    if bare in RUN_CODE:
        return f"names {bare}, which runs code of a repository"
    if "." not in name or (not is_class and not _is_module(top)):
        return None
    if not any(name.startswith(f"{prefix}.") or name == prefix for prefix in ALLOWED):
        ours = any(prefix.startswith(f"{top}.") for prefix in ALLOWED)
        return f"names {name}, which " + ("can write files or run code" if ours else "is not one of ours")
    return None if _is_of_a_kind(name) else f"names {name}, which is not a class that a run is made of"


def _is_module(top: str) -> bool:
    """Returns whether a package or module of this name is installed, or is in the working directory."""
    return bool(importlib.util.find_spec(top) or PathFinder.find_spec(top, [os.getcwd()]))


def _is_of_a_kind(name: str) -> bool:
    module, _, bare = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), bare)
    except (ImportError, AttributeError):
        return False
    if not isinstance(found, type):
        return False
    return issubclass(found, KINDS) or (issubclass(found, Callback | Strategy) and bare in HARMLESS)


def _vouched(name: str) -> str:
    """Returns what to pass to --trust for a name: the package, unless a run may name parts of it."""
    top = name.partition(".")[0]
    return name if any(prefix.partition(".")[0] == top for prefix in ALLOWED) else top
