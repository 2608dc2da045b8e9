"""A run's directory: what `tl fit` leaves there, and how it is read again.

runs/<name>/version_0/   config.yaml               everything resolved, so that later defaults change nothing
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
from tl_modules.runs.trust import check_config, imports_only

__all__ = ["load_run"]

MAPPINGS = ("trainer", "model", "data", "cache", "select")
SECTIONS = ("seed_everything", "name", *MAPPINGS)
# what arguments were before they existed, or before their defaults changed
EARLIER_CRITIC = {"layers": 1, "hidden": 256, "batch_norm": False}
EARLIER_ROWS = {"scale": "each", "clip": None, "widths": [64, 64]}
LEFT_UNSAID: dict[str, dict[str, Any]] = {
    "MLPHead": {"normalize": False},
    "TabularMLP": EARLIER_ROWS,
    "VectorBackbone": EARLIER_ROWS,
    "ADDA": EARLIER_CRITIC | {"gamma": 0.0},
    "DANN": EARLIER_CRITIC,
    "PADA": EARLIER_CRITIC,
    "MDD": {"dropout": 0.0},
}
TAKEN = {"GroupDRO": "weight", "Mixup": "weight", "SHOT": "momentum"}  # by methods of version 0.1, and no more


def new_run(root: str | os.PathLike[str], name: str) -> Path:
    """Creates the next free `root/runs/name/version_N`.

    Raises:
        UserError: It cannot be written there.
    """
    parent = Path(root) / "runs" / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        version = max(versions(parent), default=-1) + 1
        while True:
            try:
                (parent / f"version_{version}" / "checkpoints").mkdir(parents=True)
                return parent / f"version_{version}"
            except FileExistsError:  # another process took it
                version += 1
    except OSError as error:
        raise UserError(
            f"default_root_dir: the run directory {parent} cannot be written ({error.strerror}); "
            "pass --trainer.default_root_dir DIR"
        ) from error


class _Dumper(yaml.SafeDumper):
    """Quotes also texts that YAML 1.1 does not take for numbers, and the parser does, e.g. 1e3."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        float(text)
    except ValueError:
        return dumper.represent_str(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


_Dumper.add_representer(str, _represent_text)


def to_yaml(config: Any) -> str:
    """A config as YAML, in which a text stays a text whoever reads it."""
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False)


def write_config(run: Path, config: dict[str, Any]) -> None:
    """Writes a run's config.yaml."""
    write_whole(run / "config.yaml", to_yaml(config))


def read_config(run: Path, trusted: Sequence[str] = ()) -> dict[str, Any]:
    """The sections of a run's config.yaml that every command shares.

    Raises:
        UserError: It is not a mapping of sections, or names what a config of someone else's must not.
    """
    file = run / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"run: {file} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(config, dict):
        raise UserError(f"run: {file} is not a mapping of {', '.join(SECTIONS)}")
    config = {key: value for key, value in config.items() if key in SECTIONS}
    for key in MAPPINGS:
        if not isinstance(config.get(key) or {}, dict):
            raise UserError(f"run: {file}: {key} is not a mapping")
    for key in ("folder", "disk_gb"):  # the cache is the machine's; somebody else must not say what to empty
        (config.get("cache") or {}).pop(key, None)
    check_config(config, trusted, f"run: {file}")
    _keep_earlier_defaults(config)
    return config


def _keep_earlier_defaults(config: dict[str, Any]) -> None:
    """Writes out what a run of version 0.1 left unsaid, and what would mean something else now."""
    arguments = (config.get("model") or {}).get("init_args") or {}
    methods = arguments.get("methods") or []
    for part in (arguments.get("head"), arguments.get("backbone"), *methods):
        if said := LEFT_UNSAID.get(_our_class(part)):
            part["init_args"] = said | (part.get("init_args") or {})
    for method in methods:
        if (name := _our_class(method)) in TAKEN:
            given = (method.get("init_args") or {}).pop(TAKEN[name], None)
            if name == "Mixup" and given is not None and arguments.get("source_weight") == 0:
                arguments["source_weight"] = given  # what it mixes takes the place of the source's samples
    if "num_outputs" in arguments and "schema" not in arguments:
        count, names = arguments.pop("num_outputs"), arguments.pop("class_names", None)
        arguments["schema"] = count if names is None else {"x": {}, "y": {"classes": names}}


def _our_class(part: Any) -> str:
    """The name of a class of ours that a config's part names, or nothing."""
    module, _, name = str(part.get("class_path") if isinstance(part, dict) else "").rpartition(".")
    return name if module.partition(".")[0] in ("", "tl_modules") else ""


def without_weights(model: Any) -> Any:
    """A model's config (mapping or Namespace) that leaves its backbone random, where a checkpoint fills it anyway."""
    arguments = model.get("init_args") or {}
    if arguments.get("save") != "trainable":
        _leave_random(arguments.get("backbone"))
    return model


def _leave_random(part: Any) -> None:
    """Takes the weights out of a backbone's config, and of those within it."""
    values = vars(part) if isinstance(part, Namespace) else part
    if isinstance(values, dict):
        arguments = values.get("init_args")
        if arguments and arguments.get("weights") is not None:
            arguments["weights"] = None
        for inner in values.values():
            _leave_random(inner)


def decided(config: Any, backbone: Any) -> None:
    """Writes into a backbone's config, in place, what `decided_by_schema` names; also of the backbones within it."""
    if not isinstance(config, dict) or backbone is None:
        return
    if "class_path" not in config:  # several by name
        for name, inner in config.items():
            decided(inner, backbone[name] if isinstance(backbone, nn.ModuleDict) else None)
        return
    arguments = config.setdefault("init_args", {})
    for name, inner in arguments.items():
        decided(inner, getattr(backbone, name, None))
    taken = inspect.signature(type(backbone)).parameters  # a subclass may decide on some itself
    decided_on = [name for name in getattr(backbone, "decided_by_schema", ()) if name in taken]
    arguments |= {name: getattr(backbone, name) for name in decided_on}


def load_run(path: str | os.PathLike[str], checkpoint: str = "best", trust: Sequence[str] = ()) -> LightningModule:
    """The trained module of a run, in eval mode.

    Args:
        path: The run's directory.
        checkpoint: "best" or "last".
        trust: Modules of your own that its config may name; importing them runs their code.

    Raises:
        UserError: It is not a run directory, the checkpoint is not there or damaged, or the config names what it must not.
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
    """Gives a module the weights of a checkpoint's content."""
    module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"])
    return module


Distillation.read_run = staticmethod(load_run)  # of teachers, whose room is below this one
