"""Earlier names of classes and options: configs and command lines may contain them for one more version.

a run's config.yaml, -c FILE    select: {by: few}    class_path: tl_modules.Full     read as the current names,
the command line                --select.by few      --model.finetuning Full         each with one warning
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

from tl_modules.batch.compat import name_classes_too

log = logging.getLogger(__name__)
DROPPED = "0.3"  # the version that no longer reads them
CLASSES = {
    "Classes": "ClassSubset",
    "Colour": "SpuriousColour",
    "DomainBatchNorm": "DSBN",
    "Full": "FullFineTuning",
    "HubBackbone": "TorchHubBackbone",
    "Identity": "NoShift",
    "Linear": "LinearWeight",
    "MinimumEntropy": "EntropyMinimization",
    "OptimalTransport": "DeepJDOT",
    "Ramp": "RampWeight",
    "Schedule": "WeightSchedule",
    "Shifted": "SyntheticDomains",
    "Tables": "TabularData",
    "VectorBackbone": "TabularMLP",
}
OPTIONS = {
    "auto_batch": "find_batch_size",
    "model.save": "model.checkpoint_weights",
    "save_every": "save_every_n_steps",
    "select.by": "selection.criterion",
}


def current_class(name: str) -> str:
    """Returns the current name of a class, bare or dotted; other names as they are, e.g. `torch.nn.Identity`."""
    package, dot, _ = name.partition(".")
    bare = name.rpartition(".")[2]
    if bare not in CLASSES or package not in (bare, "tl_modules", "datamodules"):
        return name
    return f"{package}.{CLASSES[bare]}" if dot else CLASSES[bare]


def current_args(args: Sequence[str]) -> list[str]:
    """Returns the arguments of a command line with the current names of options."""
    return [_current_option(word) if word.startswith("--") else word for word in args]


def _current_option(word: str) -> str:
    option, equals, value = word.removeprefix("--").partition("=")
    old = option.replace(".init_args.", ".")
    if old not in OPTIONS:
        return word
    warn(old, OPTIONS[old])
    return f"--{OPTIONS[old]}{equals}{value}"


def current_options(config: dict[str, Any]) -> bool:
    """Gives the options in a config their current names, in place; returns whether there were others."""
    found = [old for old in OPTIONS if old.rpartition(".")[2] in _section(config, old.rpartition(".")[0])]
    for old in found:
        (section, _, option), (target, _, name) = old.rpartition("."), OPTIONS[old].rpartition(".")
        here = _section(config, section)
        if target != section:
            config.setdefault(target, {})
        _section(config, target).setdefault(name, here.pop(option))
        if not here:
            del config[section]
        warn(old, OPTIONS[old])
    return bool(found)


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns a section's arguments; an empty mapping if it has none."""
    here = config.get(name) if name else config
    here = here.get("init_args", here) if isinstance(here, dict) else None
    return here if isinstance(here, dict) else {}


@functools.cache
def warn(old: str, new: str) -> None:
    """Warns, once for each name."""
    log.warning("%s is now %s; version %s will not read the old name", old, new, DROPPED)


name_classes_too(current_class, warn)
