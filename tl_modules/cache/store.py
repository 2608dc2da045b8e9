"""Tensors on disk by key, memory-mapped: larger than memory if need be, shared by processes and by later runs.

    FOLDER/<key>/0.bin 1.bin ...   raw rows
                 meta.json         shapes, types and checksums; what has none is not finished

A key is 32 hexadecimal digits; nothing of another name in the folder is touched. An entry is written beside its place
and renamed at the end. The least recently used entries make room for new ones.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEY = "[0-9a-f]" * 32
Spec = tuple[torch.Size | tuple[int, ...], torch.dtype]


def default_folder() -> Path:
    """$TL_CACHE_DIR, or lightning-transfer in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TL_CACHE_DIR") or Path(base) / "lightning-transfer")


class Store:
    """Entries of tensors in a folder.

    Args:
        folder: Where; created when first written.
        limit: Bytes that all entries together may take.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def open(self, key: str) -> list[Tensor] | None:
        """An entry's tensors, memory-mapped, after their checksums; None if it is not there or damaged."""
        place = self.folder / key
        try:
            meta = json.loads((place / "meta.json").read_text())
            tensors = _map(place, [(tuple(p["shape"]), getattr(torch, p["dtype"])) for p in meta["parts"]], new=False)
        except (OSError, ValueError, KeyError, RuntimeError):
            return None
        if [_checksum(t) for t in tensors] != [p["checksum"] for p in meta["parts"]]:
            self.remove(key)
            return None
        with contextlib.suppress(OSError):
            os.utime(place / "meta.json")
        return tensors

    def remove(self, key: str) -> None:
        """Removes an entry; tensors mapped to it stay readable."""
        shutil.rmtree(self.folder / key, ignore_errors=True)

    def room(self, size: int) -> str | None:
        """Why an entry of `size` bytes does not fit, or None."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            return f"{self.folder} cannot be written ({error.strerror})"
        if not os.access(self.folder, os.W_OK):
            return f"{self.folder} cannot be written"
        if size > self.limit:
            return f"{size / 1e9:.1f} GB are more than --cache.disk_gb {self.limit / 1e9:g}"
        # what is removed to make room counts as free
        if size > free * 0.9 + sum(_size(entry) for entry in self._entries()):
            return f"{size / 1e9:.1f} GB do not fit in {self.folder}"
        return None

    def begin(self, key: str, token: str, specs: Sequence[Spec], create: bool = True) -> list[Tensor]:
        """Maps the tensors of an entry that is not finished yet; one process creates them, others join.

        Args:
            key: Of the entry.
            token: Of this attempt, which no other has, whatever has become of it.
            specs: Shape and type of each tensor.
            create: Whether this is the process that creates them.
        """
        part = self._part(key, token)
        if create:
            self._evict(sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs))
            part.mkdir(parents=True)
        return _map(part, specs, new=create)

    def commit(self, key: str, token: str, tensors: Sequence[Tensor]) -> None:
        """Gives a finished entry its place; a second run that was as fast keeps its own."""
        part = self._part(key, token)
        meta = [
            {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "checksum": _checksum(t)}
            for t in tensors
        ]
        (part / "meta.json").write_text(json.dumps({"parts": meta}))
        try:
            part.rename(self.folder / key)
        except OSError:
            self.drop(key, token)

    def drop(self, key: str, token: str) -> None:
        """Removes an entry that is not finished; tensors mapped to it stay readable."""
        shutil.rmtree(self._part(key, token), ignore_errors=True)

    def _part(self, key: str, token: str) -> Path:
        return self.folder / f".{key}.{token}.part"

    def _entries(self) -> list[Path]:
        """Finished entries, the least recently used first."""
        return sorted((p.parent for p in self.folder.glob(f"{KEY}/meta.json")), key=_used)

    def _evict(self, size: int) -> None:
        for part in self.folder.glob(f".{KEY}.*.part"):  # of a killed run
            with contextlib.suppress(OSError):
                if time.time() - part.stat().st_mtime > 86400:
                    shutil.rmtree(part, ignore_errors=True)
        entries = self._entries()
        total = sum(map(_size, entries))
        while entries and (
            total + size > self.limit or (self.folder.exists() and size > shutil.disk_usage(self.folder).free * 0.9)
        ):
            total -= _size(entries[0])
            shutil.rmtree(entries.pop(0), ignore_errors=True)


def _map(place: Path, specs: Sequence[Spec], new: bool) -> list[Tensor]:
    tensors = []
    for number, (shape, dtype) in enumerate(specs):
        file = place / f"{number}.bin"
        size = math.prod(shape)
        if not new and file.stat().st_size != size * dtype.itemsize:
            raise ValueError(f"{file} is cut short")
        flat: Any = torch.from_file(str(file), shared=True, size=size, dtype=dtype)
        tensors.append(flat.view(tuple(shape)))
    return tensors


def _checksum(tensor: Tensor) -> int:
    total = 0
    flat: Any = tensor.reshape(-1).view(torch.uint8)
    for chunk in flat.split(1 << 26):
        total = zlib.crc32(memoryview(chunk.numpy()), total)
    return total


def _used(entry: Path) -> float:
    with contextlib.suppress(OSError):
        return (entry / "meta.json").stat().st_mtime
    return 0.0


def _size(entry: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in entry.iterdir())
    return 0
