"""A run's directory: what `tl fit` writes there, and how it is read again.

runs/<name>/version_0/   config.yaml               complete, so that later changes of defaults have no effect
                         checkpoints/best.ckpt     and last.ckpt
                         metrics.csv               a row per epoch
                         metrics.json              the best epoch's validation metrics; `tl test` adds its own
                         events.out.tfevents...    TensorBoard
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch import LightningModule
from torch import nn

from tl_modules.checkpoints.files import find_run, load_checkpoint, versions, write_whole
from tl_modules.errors import UserError
from tl_modules.methods.teacher import Distillation
from tl_modules.runs.renamed import current_class, current_options
from tl_modules.runs.trust import check_config, imports_only

__all__ = ["load_run"]

MAPPINGS = ("trainer", "model", "data", "cache", "selection")
SECTIONS = ("seed_everything", "name", *MAPPINGS)
# values of arguments before they existed, or before their defaults changed
EARLIER_CRITIC = {"layers": 1, "hidden": 256, "batch_norm": False}
EARLIER_ROWS = {"scale": "each", "clip": None, "widths": [64, 64]}
LEFT_UNSAID: dict[str, dict[str, Any]] = {
    "MLPHead": {"normalize": False},
    "TabularMLP": EARLIER_ROWS,
    "ADDA": EARLIER_CRITIC | {"gamma": 0.0},
    "DANN": EARLIER_CRITIC,
    "PADA": EARLIER_CRITIC,
    "MDD": {"dropout": 0.0},
}
TAKEN = {"GroupDRO": "weight", "Mixup": "weight", "SHOT": "momentum"}  # arguments that methods of version 0.1 had


def new_run(root: str | os.PathLike[str], name: str) -> Path:
    """Creates the next free `root/runs/name/version_N`.

    Raises:
        UserError: The directory cannot be written.
    """
    parent = Path(root) / "runs" / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        version = max(versions(parent), default=-1) + 1
        while True:
            try:
                (parent / f"version_{version}" / "checkpoints").mkdir(parents=True)
                return parent / f"version_{version}"
            except FileExistsError:  # another process created it
                version += 1
    except OSError as error:
        raise UserError(
            f"default_root_dir: the run directory {parent} cannot be written ({error.strerror}); "
            "pass --trainer.default_root_dir DIR"
        ) from error


class _Dumper(yaml.SafeDumper):
    """Also quotes texts that the parser, unlike YAML 1.1, reads as numbers, e.g. 1e3."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        float(text)
    except ValueError:
        return dumper.represent_str(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


_Dumper.add_representer(str, _represent_text)


def to_yaml(config: Any) -> str:
    """Formats a config as YAML in which texts are read back as texts by any reader."""
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False)


def write_config(run: Path, config: dict[str, Any]) -> None:
    """Writes a run's config.yaml."""
    write_whole(run / "config.yaml", to_yaml(config))


def read_config(run: Path, trusted: Sequence[str] = ()) -> dict[str, Any]:
    """Reads the sections of a run's config.yaml that all commands share.

    Raises:
        UserError: It is not a mapping of sections, or names something that is not allowed.
    """
    file = run / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"run: {file} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(config, dict):
        raise UserError(f"run: {file} is not a mapping of {', '.join(SECTIONS)}")
    current_options(config)
    config = {key: value for key, value in config.items() if key in SECTIONS}
    for key in MAPPINGS:
        if not isinstance(config.get(key) or {}, dict):
            raise UserError(f"run: {file}: {key} is not a mapping")
    for key in ("folder", "disk_gb"):  # the cache belongs to the machine; a sender must not decide what is deleted
        (config.get("cache") or {}).pop(key, None)
    check_config(config, trusted, f"run: {file}")
    _keep_earlier_defaults(config)
    return config


def _keep_earlier_defaults(config: dict[str, Any]) -> None:
    """Adds arguments that version 0.1 left open, and whose defaults have since changed."""
    arguments = (config.get("model") or {}).get("init_args") or {}
    methods = arguments.get("methods") or []
    for part in (arguments.get("head"), arguments.get("backbone"), *methods):
        if said := LEFT_UNSAID.get(_our_class(part)):
            part["init_args"] = said | (part.get("init_args") or {})
    for method in methods:
        if (name := _our_class(method)) in TAKEN:
            given = (method.get("init_args") or {}).pop(TAKEN[name], None)
            if name == "Mixup" and given is not None and arguments.get("source_weight") == 0:
                arguments["source_weight"] = given  # its mixed samples replace the source's
    if "num_outputs" in arguments and "schema" not in arguments:
        count, names = arguments.pop("num_outputs"), arguments.pop("class_names", None)
        arguments["schema"] = count if names is None else {"x": {}, "y": {"classes": names}}


def _our_class(part: Any) -> str:
    """Returns the name of our class in a part of a config, or an empty string."""
    path = current_class(str(part.get("class_path") if isinstance(part, dict) else ""))
    module, _, name = path.rpartition(".")
    return name if module.partition(".")[0] in ("", "tl_modules") else ""


def without_weights(model: Any) -> Any:
    """Returns a model's config (mapping or Namespace) without its backbone's weights, which a checkpoint will set."""
    arguments = model.get("init_args") or {}
    if arguments.get("checkpoint_weights") != "trainable":
        _leave_random(arguments.get("backbone"))
    return model


def _leave_random(part: Any) -> None:
    """Removes the weights from a backbone's config, and from backbones inside it."""
    values = vars(part) if isinstance(part, Namespace) else part
    if isinstance(values, dict):
        arguments = values.get("init_args")
        if arguments and arguments.get("weights") is not None:
            arguments["weights"] = None
        for inner in values.values():
            _leave_random(inner)


def decided(config: Any, backbone: Any) -> None:
    """Writes the values of `decided_by_schema` into a backbone's config, in place; also for backbones inside it."""
    if not isinstance(config, dict) or backbone is None:
        return
    if "class_path" not in config:  # several backbones by name
        for name, inner in config.items():
            decided(inner, backbone[name] if isinstance(backbone, nn.ModuleDict) else None)
        return
    arguments = config.setdefault("init_args", {})
    for name, inner in arguments.items():
        decided(inner, getattr(backbone, name, None))
    taken = inspect.signature(type(backbone)).parameters  # a subclass may set some itself
    decided_on = [name for name in getattr(backbone, "decided_by_schema", ()) if name in taken]
    arguments |= {name: getattr(backbone, name) for name in decided_on}


def load_run(path: str | os.PathLike[str], checkpoint: str = "best", trust: Sequence[str] = ()) -> LightningModule:
    """Loads the trained module of a run, in eval mode.

    Args:
        path: The run's directory.
        checkpoint: "best" or "last".
        trust: Your own modules that its config may name; importing them runs their code.

    Raises:
        UserError: It is not a run directory, the checkpoint is missing or damaged, or the config names something else.
    """
    run = find_run(path)
    config = read_config(run, trust)
    content = load_checkpoint(run / "checkpoints" / f"{checkpoint}.ckpt")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model")
    with imports_only(trust):
        try:
            parsed = parser.parse_object({"model": without_weights(config["model"])})
        except ArgumentError as error:
            raise UserError(f"run: {run / 'config.yaml'}: {' '.join(str(error).split())[:300]}") from error
        check_config(yaml.safe_load(parser.dump(parsed, skip_none=False)), trust, f"run: {run / 'config.yaml'}")
        module: LightningModule = parser.instantiate_classes(parsed).model
    return load_state_into(module, content).eval()


def load_state_into(module: LightningModule, content: dict[str, Any]) -> LightningModule:
    """Loads a checkpoint's weights into a module."""
    module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"])
    return module


Distillation.read_run = staticmethod(load_run)  # for teachers, since `methods/` cannot import `runs/`
