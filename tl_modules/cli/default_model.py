"""The default model, or its default backbone, if the command line does not name one: chosen by the data.

photos, GPU                                   ConvNeXt-T       28 million parameters, 82.5 % on ImageNet
photos, CPU                                   MobileNetV3-L    5 million parameters, 74.0 % on ImageNet
the embedded digits and all other images      ConvNet          from scratch
texts (TextFiles)                             MiniLM           22 million parameters, `ENCODER`
rows (TabularData)                            TabularMLP       from scratch
recordings (AudioFolders)                     SpeechConvNet    from scratch

If a TabularMLP learns classes from scratch, SGD trains it with a linear head, because its features are normalised.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import tl_modules
from datamodules import AudioFolders, TabularData, TextFiles
from tl_modules.backbones import TabularMLP
from tl_modules.cli.arguments import read_yaml, values
from tl_modules.cli.precision import on_gpu
from tl_modules.errors import UserError
from tl_modules.finetuning.optimizer import ROWS
from tl_modules.module import TransferModule
from tl_modules.runs.directory import SECTIONS
from tl_modules.runs.renamed import current_class

log = logging.getLogger(__name__)
# torchvision models, by whether there is a GPU, and the reason
PHOTOS = {
    True: ("convnext_tiny", "IMAGENET1K_V1", "a GPU trains it in minutes, and it transfers well"),
    False: ("mobilenet_v3_large", "IMAGENET1K_V1", "without a GPU it trains in a third of a ResNet-18's time"),
}
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
OTHERS = {
    TextFiles: ["TransformerBackbone", "--model.backbone.name", ENCODER],
    TabularData: ["TabularMLP"],
    AudioFolders: ["SpeechConvNet"],
}
CLASSES = (None, "Classification", "tl_modules.Classification")
NESTED = 3  # levels of data that wraps data


def with_defaults(args: list[str]) -> list[str]:
    """Adds the embedded data, a task and a backbone if neither the command line nor a config names them.

    These cannot be parser defaults: jsonargparse would keep their init_args when the user picks another class.

    Raises:
        UserError: A config cannot be read or is not a mapping.
    """
    configs = [_mapping(config) for config in values(args, "-c", "--config")]
    task, data = (_said(args, configs, section) for section in ("model", "data"))
    new = [word for section in ("model", "data") for word in _class_first(args, configs, section)]
    backbone = _said(args, configs, "model", "backbone")
    if backbone is None and _takes_backbone(task):
        words = _backbone(args, configs)
        backbone = words[1]
        new += ["--model", task or "Classification", *words]
    elif task is None:
        new += ["--model", "Classification"]
    if _class(backbone or "", "tl_modules") is TabularMLP and task in CLASSES:
        rows = _for_rows(args, configs)
        # a class comes before its arguments
        new += ["--model", task, *rows] if rows and task and "--model" not in new else rows
    if data is None:
        new += ["--data", "Digits"]
    return [args[0], *new, *args[1:]]


def _class_first(args: Sequence[str], configs: Sequence[Mapping[str, Any]], section: str) -> list[str]:
    """Repeats a class that only the command line names before the arguments and configs that set its arguments."""
    named = values(args, f"--{section}")
    words = [word.partition("=")[0] for word in args if word.startswith(f"--{section}")]
    late = bool(named) and (configs or words[0] != f"--{section}")
    return [f"--{section}", named[-1]] if late and _said([], configs, section) is None else []


def _for_rows(args: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Adds how a network for rows is trained from scratch, as far as nothing else is given."""
    if _said(args, configs, "model", "backbone", "weights") is not None:
        return []
    words = [] if _said(args, configs, "model", "head") else ["--model.head", "torch.nn.Linear"]
    if _said(args, configs, "model", "optimizer") is None:
        options = [(f"--model.optimizer.{name}", str(value).lower()) for name, value in ROWS.items()]
        words += ["--model.optimizer", "SGD", *(word for pair in options for word in pair)]
    return words


def _backbone(args: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    nested = [_said(args, configs, *["data"] * depth) for depth in range(1, NESTED + 1)]
    kinds = [kind for kind in (_class(name, "datamodules") for name in nested if name) if isinstance(kind, type)]
    for data, words in OTHERS.items():
        if any(issubclass(kind, data) for kind in kinds):
            return ["--model.backbone", *words]
    if not any(getattr(kind, "photos", False) for kind in kinds):
        return ["--model.backbone", "ConvNet"]
    gpu = on_gpu(_said(args, configs, "trainer", "accelerator") or "auto")
    name, weights, why = PHOTOS[gpu]
    if not values(args, "--model.backbone.name"):
        log.info("backbone: %s, torchvision's %s, since none is given: %s", name, weights, why)
    words = ["--model.backbone", "TorchvisionBackbone", "--model.backbone.name", name]
    return [*words, "--model.backbone.weights", weights]


def _takes_backbone(task: str | None) -> bool:
    """Returns whether a task is one of ours; other tasks may not have a backbone."""
    found = _class(task, tl_modules.__name__) if task else TransferModule
    return isinstance(found, type) and issubclass(found, TransferModule)


def _class(name: str, package: str) -> Any:
    """Imports a class by its dotted name, or its bare name in a package; None if that fails."""
    module, _, last = current_class(name).rpartition(".")
    try:
        return getattr(importlib.import_module(module or package), last, None)
    except Exception:  # a user's file may raise anything
        return None


def _said(args: Sequence[str], configs: Sequence[Mapping[str, Any]], *path: str) -> str | None:
    """Returns the class or value at a path, e.g. "model", "backbone", in the arguments or else the configs."""
    if words := values(args, f"--{'.'.join(path)}"):
        return words[-1]
    for config in reversed(configs):
        here: Any = config
        for key in path:
            here = here.get("init_args", here) if isinstance(here, Mapping) else {}
            here = here.get(key) if isinstance(here, Mapping) else None
        found = here.get("class_path") if isinstance(here, Mapping) else here
        if isinstance(found, str):
            return found
    return None


def _mapping(config: str) -> dict[str, Any]:
    """Reads a config, given as a file or as text."""
    content = read_yaml(config, "config") or {}
    if not isinstance(content, dict):
        raise UserError(f"config: {config} is not a mapping of {', '.join(SECTIONS)}")
    return content
