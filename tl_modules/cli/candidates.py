"""The candidates of `tl rank`: an argument or a config becomes a backbone, with the classifier of its weights.

resnet18                    from torchvision or timm, with its default pretrained weights
resnet18=FILE               with these weights: a hub name, a file or a run; `null` leaves them random
runs/NAME                   the backbone of a run, and its head
ConvNet, mine.MyNet=FILE    a class
FILE.yaml                   names, each with one of these, or class_path and init_args
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

from jsonargparse import ArgumentError
from torch import nn

import tl_modules
from tl_modules.backbones.base import Backbone
from tl_modules.checkpoints.files import find_run
from tl_modules.cli.arguments import read_yaml
from tl_modules.cli.messages import explain
from tl_modules.cli.parser import KNOWN, Parser
from tl_modules.cli.paths import absolute_paths
from tl_modules.errors import UserError, closest
from tl_modules.heads import LinearHead
from tl_modules.module import TransferModule
from tl_modules.runs.directory import load_run

Entry = str | Mapping[str, Any]


def candidates(words: Sequence[str]) -> dict[str, Entry]:
    """Reads the candidates of a command line, by name.

    Raises:
        UserError: A file cannot be read, or is not a mapping of names to candidates.
    """
    found: dict[str, Entry] = {}
    for word in words:
        found |= _of_file(Path(word)) if word.endswith((".yaml", ".yml")) else {word: word}
    return found


def _of_file(file: Path) -> dict[str, Entry]:
    content = read_yaml(file, "backbones")
    if not isinstance(content, dict) or not content:
        raise UserError(f"backbones: {file} is not a mapping of names to backbones")
    for name, entry in content.items():
        if not isinstance(entry, str | None) and not (isinstance(entry, dict) and "class_path" in entry):
            raise UserError(f"backbones: {file}: {name}: {entry} must be a text or a class_path with init_args")
    return {str(name): str(name) if entry is None else entry for name, entry in content.items()}


def build(entry: Entry, trust: Sequence[str] = ()) -> tuple[Backbone, nn.Module | None]:
    """Builds a candidate.

    Args:
        entry: A text or a config.
        trust: What the configs of runs may name besides our classes.

    Returns:
        The backbone, and the head if it comes from a classification run, pooled features (B, D) -> logits.

    Raises:
        UserError: The backbone does not exist, or its weights are not available.
    """
    if not isinstance(entry, str):
        return _parsed(entry), None
    name, equals, weights = entry.partition("=")
    if not equals and Path(name).expanduser().is_dir():
        module = load_run(find_run(name), trust=trust)
        if not isinstance(module, TransferModule):
            raise UserError(f"{name}: {type(module).__name__} has no backbone")
        return module.backbone, module.head if module.is_classification else None
    given = {"weights": None if weights == "null" else weights} if equals else {}
    owner = _hub(name)
    if owner:
        config = {"class_path": owner, "init_args": {"name": name, "weights": "DEFAULT"} | given}
    else:
        config = {"class_path": name, "init_args": given}
    return _parsed(config), None


def _hub(name: str) -> str | None:
    """Returns the backbone class for an architecture of this name; None if it names a class.

    Raises:
        UserError: It is neither an architecture nor a class.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name in known:
        return "TorchvisionBackbone"
    if importlib.util.find_spec("timm"):
        import timm

        known = known + timm.list_models()
        if timm.is_model(name.split(".")[0]):
            return "TimmBackbone"
    classes = [n for n in KNOWN if isinstance(c := getattr(tl_modules, n, None), type) and issubclass(c, Backbone)]
    if name in classes or ("." in name and "/" not in name):
        return None
    raise UserError(f"{name} is not a classifier of torchvision or timm, a backbone class or a run directory"
                    f"{closest(name, [*known, *classes])}")  # fmt: skip


@cache
def _arguments() -> Parser:
    parser = Parser(exit_on_error=False)
    parser.add_subclass_arguments(Backbone, "backbone")
    return parser


def _parsed(config: Mapping[str, Any]) -> Backbone:
    try:
        parsed = _arguments().parse_object({"backbone": dict(config)})
    except ArgumentError as error:
        raise UserError(explain(str(error), [], [], KNOWN)) from error
    absolute_paths(parsed.backbone)  # as in a fit, so that it can use the cached features
    return cast(Backbone, _arguments().instantiate_classes(parsed).backbone)


def source_classifier(backbone: Backbone) -> nn.Module | None:
    """Returns the last layer of the pretrained weights, or a run's `LinearHead`; None if there is neither."""
    pretrained, width = backbone.pretrained, backbone.width
    head = dict(pretrained.head) if pretrained is not None else {}
    if pretrained is None or pretrained.task.get("class_names", ()) is None:  # a run's values are not classes
        return None
    kind, key = (nn.Linear, "weight") if "weight" in head else (LinearHead, "1.weight")
    if key not in head or head[key].ndim != 2 or head[key].shape[1] != width:
        return None
    layer = kind(width, len(head[key]))
    if layer.state_dict().keys() != head.keys():
        return None
    layer.load_state_dict(head)
    return layer
