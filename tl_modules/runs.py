"""A run's directory: what `tl fit` leaves there, and how it is read again.

runs/<name>/version_0/   config.yaml               everything resolved, so that later defaults change nothing
                         checkpoints/best.ckpt     and last.ckpt
                         metrics.csv               a row per epoch
                         metrics.json              the best epoch's validation metrics; `tl test` adds its own
                         events.out.tfevents...    TensorBoard
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule

from tl_modules.errors import UserError

SECTIONS = ("seed_everything", "name", "trainer", "model", "data")


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


def versions(folder: Path) -> dict[int, Path]:
    """The run directories in `folder` by their number."""
    return {int(p.name[8:]): p for p in folder.glob("version_*") if p.name[8:].isdigit()}


def find_run(path: str | os.PathLike[str]) -> Path:
    """The run directory at `path`; for a folder of versions, the newest one.

    Raises:
        UserError: It is no run directory.
    """
    run = Path(path).expanduser()
    if not (run / "config.yaml").is_file():
        whole = {n: p for n, p in versions(run).items() if (p / "config.yaml").is_file()}
        run = whole[max(whole)] if whole else run
    if not (run / "config.yaml").is_file():
        raise UserError(f"run: {run} is no run directory: it has no config.yaml")
    return run


def read_config(run: Path) -> dict[str, Any]:
    """The sections of a run's config.yaml that every command shares."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    return {key: value for key, value in config.items() if key in SECTIONS}


def without_weights(model: Any) -> Any:
    """A model's config (mapping or Namespace) that leaves its backbone random, as a checkpoint fills it anyway."""
    arguments = model.get("init_args", {}).get("backbone", {}).get("init_args", {})
    if arguments.get("weights") is not None:
        arguments["weights"] = None
    return model


def load_run(path: str | os.PathLike[str], checkpoint: str = "best") -> LightningModule:
    """The trained module of a run, in eval mode.

    Args:
        path: The run's directory.
        checkpoint: "best" or "last".

    Raises:
        UserError: It is no run directory, or the checkpoint is not there.
    """
    run = find_run(path)
    file = run / "checkpoints" / f"{checkpoint}.ckpt"
    if not file.is_file():
        raise UserError(f"run: {run} has no checkpoints/{checkpoint}.ckpt")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model")
    config = parser.parse_object({"model": without_weights(read_config(run)["model"])})
    module: LightningModule = parser.instantiate_classes(config).model
    module.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["state_dict"])
    return module.eval()


def write_metrics(run: Path, metrics: dict[str, float]) -> None:
    """Merges metrics into metrics.json, replacing the file whole."""
    file = run / "metrics.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    temporary = file.with_suffix(".json.part")
    temporary.write_text(json.dumps(known | metrics, indent=2) + "\n")
    temporary.replace(file)
