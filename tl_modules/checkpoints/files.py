"""Checkpoint files that are written atomically, and that hold only tensors and plain data.

    write .last.ckpt.part in the target folder -> fsync -> replace last.ckpt -> fsync the folder

A file's checksums are those of the zip format that torch.save writes: a CRC-32 for each tensor.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import CheckpointIO

from tl_modules.checkpoints.compressed import dequantized
from tl_modules.errors import UserError, chain

log = logging.getLogger(__name__)
SPAWNED = ".temp.ckpt"  # the weights that a spawned process hands over (lightning/.../launchers/multiprocessing.py)
AS_NAMED: Any = {"encoding": "utf-8", "errors": "surrogateescape"}  # file names need not be UTF-8


class AtomicCheckpointIO(CheckpointIO):
    """Saves atomically, checks checksums before it loads, and loads nothing that could run code."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Writes to a temporary file that replaces the target only when everything is on the disk.

        Raises:
            UserError: The file cannot be written; an earlier one is kept.
        """
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch's writer raises a RuntimeError on a full disk
            cause = next((each for each in chain(error) if isinstance(each, OSError)), None)
            if cause is None:
                raise
            with contextlib.suppress(OSError):
                part.unlink()
            raise UserError(
                f"checkpoint: {path} could not be written ({cause.strerror}); it needs {_size(checkpoint):,} bytes, "
                f"{_free(path.parent):,} are free"
            ) from error

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Returns the checkpoint's content; `weights_only` is always on.

        Raises:
            UserError: It is missing, damaged, or holds more than tensors and plain data.
        """
        return load_checkpoint(path, map_location, alone=Path(path).name == SPAWNED)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Removes a file, if it exists."""
        Path(path).unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu", alone: bool = False) -> dict[str, Any]:
    """Reads a checkpoint after verifying its checksums; int8 tensors become floats.

    Args:
        path: The file.
        map_location: Where its tensors go.
        alone: Whether the file may hold weights alone.

    Raises:
        UserError: It is missing, damaged, weights alone, or holds more than tensors and plain data.
    """
    if fault := find_corruption(path):
        raise UserError(f"checkpoint: {path} {fault}")
    try:
        content: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint: {path} holds Python objects besides tensors and plain data, which could run code; "
            "it is not loaded"
        ) from error
    if not isinstance(content, dict) or not (alone or {"state_dict", "pytorch-lightning_version"} <= content.keys()):
        raise UserError(
            f"checkpoint: {path} is no checkpoint of a run; weights alone go to --model.backbone.weights of a new run"
        )
    return dequantized(content)


def weight_bytes(path: str | os.PathLike[str]) -> int:
    """Returns the stored bytes of the tensors that a network loads from a checkpoint, without the optimizer's."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    return _size(content["state_dict"]) + _size(content.get("quantized"))


def find_corruption(path: str | os.PathLike[str]) -> str | None:
    """Returns what is wrong with a checkpoint file, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except FileNotFoundError:
        return "is not there"
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        return f"is damaged ({error})"
    return f"is damaged (wrong checksum of {broken})" if broken else None


def latest_checkpoint(folder: Path) -> Path | None:
    """Returns last.ckpt, or, if it is damaged, the newest intact checkpoint, with a warning; None if there is none."""
    last = folder / "last.ckpt"
    others = sorted((p for p in folder.glob("*.ckpt") if p != last), key=lambda p: -p.stat().st_mtime)
    faults: list[str] = []
    for path in [last, *others]:
        fault = find_corruption(path)
        if fault is None:
            if faults:
                log.warning("%s; continuing from %s", "; ".join(faults), path)
            return path
        if path.exists():
            faults.append(f"{path} {fault}")
    if faults:
        raise UserError(f"checkpoint: {'; '.join(faults)}; there is no other")
    return None


def remove_partial_files(folder: Path) -> None:
    """Removes partial files of a killed run."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size(value: Any) -> int:
    """Returns the bytes of all tensors in nested plain data."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def versions(folder: Path) -> dict[int, Path]:
    """Returns the run directories in `folder` by version number."""
    return {int(p.name[8:]): p for p in folder.glob("version_*") if p.name[8:].isdigit()}


def find_run(path: str | os.PathLike[str]) -> Path:
    """Returns the run directory at `path`; for a folder of versions, the newest one.

    Raises:
        UserError: It is not a run directory.
    """
    run = Path(path).expanduser()
    if not (run / "config.yaml").is_file():
        whole = {n: p for n, p in versions(run).items() if (p / "config.yaml").is_file()}
        run = whole[max(whole)] if whole else run
    if not (run / "config.yaml").is_file():
        raise UserError(f"run: {run} is not a run directory: it has no config.yaml")
    return run


def write_metrics(run: Path, metrics: Mapping[str, Any]) -> None:
    """Merges metrics into metrics.json; values that are not finite become null, since JSON cannot represent them."""
    file = run / "metrics.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
    write_whole(file, json.dumps(known | finite, indent=2) + "\n")


def fill_in(path: str | os.PathLike[str]) -> Path:
    """Expands ~ and $VARIABLES in a path, unless a path of exactly this name exists."""
    return Path(path) if os.path.lexists(path) else Path(os.path.expandvars(path)).expanduser()


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yields the path of a temporary file that replaces another at the end, so that this is never half written.

    A path that is not a regular file, e.g. /dev/stdout, is written directly.

    Raises:
        UserError: The file cannot be written; an earlier one is kept.
    """
    part = file.with_name(f".{file.name}.part") if file.is_file() or not file.exists() else file
    try:
        yield part
        if part != file:
            part.replace(file)
    except BaseException as error:
        if part != file:
            with contextlib.suppress(OSError):
                part.unlink()
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise UserError(f"{file} cannot be written ({getattr(error, 'strerror', None) or error})") from error
        raise


def write_whole(file: Path, text: str) -> None:
    """Replaces a file atomically.

    Raises:
        UserError: The file cannot be written.
    """
    with replacing(file) as part, part.open("w", newline="") as stream:
        stream.write(text)
