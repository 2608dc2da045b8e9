"""What a run's config may name: a copied run directory must not run code of its sender's, nor write outside itself.

    class_path: torch.optim.AdamW                    fine: a class of a kind that a run is made of
    class_path: mine.MeanMatch                       only with --trust mine
    class_path: lightning.pytorch.loggers.CSVLogger  only with --trust: it writes where its arguments say
    methods: '[{class_path: ...}]'                   never: the parser would take the text apart once more

`check_config` looks at a config before it is parsed, for the sake of its sentences, and again at what the parser made
of it, which texts and files within texts can't hide from. While the parser works, `imports_only` lets it import nothing
but what is allowed.
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

# what a run may import from: packages whose classes neither write files nor run what their arguments name
ALLOWED = (
    "tl_modules", "datamodules", "torch.nn", "torch.optim", "torchvision.transforms", "torchvision.ops", "timm.layers",
    "timm.optim", "lightning.pytorch.callbacks", "lightning.pytorch.strategies", "lightning.pytorch.plugins",
    "lightning.pytorch.cli.ReduceLROnPlateau",
)  # fmt: skip
KINDS = (nn.Module, FineTuning, WeightSchedule, Optimizer, LRScheduler, LightningDataModule, Precision)
# of these kinds, only some are harmless
HARMLESS = {
    "AdaBN", "DDPStrategy", "DeviceStatsMonitor", "EMAWeightAveraging", "EarlyStopping",
    "GradientAccumulationScheduler", "LearningRateMonitor", "MCDropout", "ModelCheckpoint", "ModelSummary",
    "RichModelSummary", "RichProgressBar", "SingleDeviceStrategy", "StochasticWeightAveraging", "T3A", "TENT",
    "TQDMProgressBar", "Timer", "WeightAveraging",
}  # fmt: skip
RUN_CODE = ("TorchHubBackbone", "HubBackbone")  # of a repository that its arguments name; the same class twice
FILES = ("dirpath", "filename")  # arguments by which a ModelCheckpoint leaves the run's directory
TEXTS = (
    "name",
    "class_names",
    "classes",
    "categories",
    "columns",
    "schema",
)  # arguments whose texts are names of the user's
SCHEMAS = ("columns", "schema")  # all that they hold is named so, but no class in it
DEEPEST, MOST = 50, 200_000  # levels and values of a config
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def check_config(config: Any, trusted: Sequence[str], where: str) -> None:
    """Refuses a config that names anything but classes that a run is made of, before any of it is imported.

    Args:
        config: Plain data.
        trusted: Modules and classes, and all below them, that the user vouches for.
        where: What messages call the config.

    Raises:
        UserError: It names something else.
    """
    for name, reason in _refused(config):
        if not any(name == prefix or name.startswith(f"{prefix}.") for prefix in trusted):
            advice = f"; if it is yours or you trust it, pass --trust {_vouched(name)}" if name else ""
            raise UserError(f"{where} {reason}{advice}")


def to_trust(config: Any) -> list[str]:
    """The modules and classes that a config of one's own names and `check_config` would ask to trust."""
    return sorted({_vouched(name) for name, _ in _refused(config) if name})


@contextmanager
def imports_only(trusted: Sequence[str]) -> Iterator[None]:
    """Inside, the parser imports nothing but what a run may name and what is trusted.

    Raises:
        UserError: What is trusted is no name of a module or class.
    """
    with import_policy_kept():
        try:
            set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*ALLOWED, *trusted])
        except ValueError as error:
            raise UserError(f"trust: {','.join(trusted)} is not a list of modules or classes ({error})") from error
        yield


def check_links(run: Path) -> None:
    """Refuses a run directory with a link that leads out of it, through which a command would write elsewhere.

    Raises:
        UserError: There is one.
    """
    home = run.resolve()
    for folder, folders, files in os.walk(run):
        for path in (Path(folder, name) for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                raise UserError(
                    f"run: {path} is a link to {path.resolve()}, outside of the run, where commands would write; "
                    "put the file itself in its place (cp -RL copies a run so)"
                )


def _refused(config: Any) -> Iterator[tuple[str, str]]:
    """What a config must not say: the name to vouch for, or "" where that does not help; and why, for a sentence."""
    for key, value, owner in leaves(config):
        if key in FILES and value is not None and owner.endswith("ModelCheckpoint"):
            yield owner, f"lets {owner} write to {value}"
        if not isinstance(value, str) or key in TEXTS + FILES:
            continue
        if _holds_structure(value):
            yield "", f"has a mapping or list as text in {key}: {value[:60]}; a run's own config has none"
        is_class = key.rpartition(".")[2] == "class_path"
        if is_class or value in RUN_CODE or _DOTTED.fullmatch(value):
            reason = _reason(value, is_class)
            if reason:
                yield value, reason


def leaves(config: Any) -> Iterator[tuple[str, Any, str]]:
    """Every value that is no mapping or list: its key, the value, and the class whose argument it is.

    Raises:
        UserError: The config contains itself, or grows beyond all bounds by its aliases.
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
    raise UserError("run: its config is nested without end; it is not that of a run")


@functools.lru_cache(MOST)  # a config repeats itself
def _holds_structure(text: str) -> bool:
    """Whether a text is YAML of a mapping or list with something in it, or of such a text."""
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
    """Why a config must not name this, or None."""
    top, bare = name.partition(".")[0], name.rpartition(".")[2]
    if bare in RUN_CODE:
        return f"names {bare}, which runs code of a repository"
    if "." not in name or (not is_class and not _is_module(top)):
        return None
    if not any(name.startswith(f"{prefix}.") or name == prefix for prefix in ALLOWED):
        ours = any(prefix.startswith(f"{top}.") for prefix in ALLOWED)
        return f"names {name}, which " + ("can write files or run code" if ours else "is none of ours")
    return None if _is_of_a_kind(name) else f"names {name}, which is no class that a run is made of"


def _is_module(top: str) -> bool:
    """Whether a package or module of this name is installed, or lies in the working directory."""
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
    """What to pass to --trust for a name: the package, unless it is one that a run may name in part."""
    top = name.partition(".")[0]
    return name if any(prefix.partition(".")[0] == top for prefix in ALLOWED) else top
