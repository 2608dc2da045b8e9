"""Checkpoint files that are whole or not there, and that hold tensors and plain data only.

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
SPAWNED = ".temp.ckpt"  # the weights that spawned processes hand over (lightning/.../launchers/multiprocessing.py)
AS_NAMED: Any = {"encoding": "utf-8", "errors": "surrogateescape"}  # names of files need not be UTF-8


class AtomicCheckpointIO(CheckpointIO):
    """Saves atomically, checks checksums before it loads, and loads nothing that could run code."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Writes beside the target and takes its place only when everything is on the disk.

        Raises:
            UserError: It cannot be written; whatever stood there still does.
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
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
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
        """The checkpoint's content; `weights_only` is always on.

        Raises:
            UserError: It is missing, damaged, or holds more than tensors and plain data.
        """
        return load_checkpoint(path, map_location, alone=Path(path).name == SPAWNED)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Removes a file that may not be there."""
        Path(path).unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu", alone: bool = False) -> dict[str, Any]:
    """Reads a checkpoint after its checksums; what is int8 in it becomes float.

    Args:
        path: The file.
        map_location: Where its tensors go.
        alone: Whether it may be weights alone.

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
    """Bytes of the tensors that a network takes of a checkpoint, as they are stored; without an optimizer's."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    return _size(content["state_dict"]) + _size(content.get("quantized"))


def find_corruption(path: str | os.PathLike[str]) -> str | None:
    """Says what is wrong with a checkpoint file as a file; None if nothing is."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except FileNotFoundError:
        return "is not there"
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        return f"is damaged ({error})"
    return f"is damaged (wrong checksum of {broken})" if broken else None


def latest_checkpoint(folder: Path) -> Path | None:
    """Returns last.ckpt, or if it is damaged the newest intact one, with a warning; None if there is none."""
    last = folder / "last.ckpt"
    others = sorted((p for p in folder.glob("*.ckpt") if p != last), key=lambda p: -p.stat().st_mtime)
    faults: list[str] = []
    for path in [last, *others]:
        fault = find_corruption(path)
        if fault is None:
            if faults:
                log.warning("%s; going on from %s", "; ".join(faults), path)
            return path
        if path.exists():
            faults.append(f"{path} {fault}")
    if faults:
        raise UserError(f"checkpoint: {'; '.join(faults)}; no other is there")
    return None


def remove_partial_files(folder: Path) -> None:
    """Removes files that a killed run left half written."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size(value: Any) -> int:
    """Bytes of all tensors in nested plain data."""
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


def write_metrics(run: Path, metrics: Mapping[str, Any]) -> None:
    """Merges metrics into metrics.json; null stands for what is not finite, which JSON has no word for."""
    file = run / "metrics.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
    write_whole(file, json.dumps(known | finite, indent=2) + "\n")


def fill_in(path: str | os.PathLike[str]) -> Path:
    """A path with ~ and $VARIABLES filled in, unless there is one that is written just so."""
    return Path(path) if os.path.lexists(path) else Path(os.path.expandvars(path)).expanduser()


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Gives the path of a file beside another, whose place it takes at the end; so that this is never half written.

    What is no regular file, e.g. /dev/stdout, is written itself.

    Raises:
        UserError: It cannot be written; whatever stood there still does.
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
    """Replaces a file at once.

    Raises:
        UserError: It cannot be written.
    """
    with replacing(file) as part, part.open("w", newline="") as stream:
        stream.write(text)
