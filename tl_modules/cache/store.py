"""Tensors on disk by key, memory-mapped: possibly larger than memory, shared by processes and by later runs.

    FOLDER/<key>/0.bin 1.bin ...   raw values
                 meta.json         shapes, types, a checksum of each MiB; without it an entry is incomplete and ignored

If a tensor's size is known beforehand, all processes of a machine write their parts of one file. Otherwise each process
appends to its own file, and these are concatenated at the end.

A key is 32 hexadecimal digits; other names in the folder are not touched. An entry is written under a temporary name
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tl_modules.errors import UserError

KEY = "[0-9a-f]" * 32
BLOCK = 2**20  # bytes that share a checksum
AT_ONCE = 2**30  # bytes of a tensor that are verified when an entry is opened, in about a second
Spec = tuple[tuple[int, ...] | None, torch.dtype]  # a tensor without a shape grows


def default_folder() -> Path:
    """Returns $TL_CACHE_DIR, or lightning-transfer in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TL_CACHE_DIR") or Path(base) / "lightning-transfer")


class Store:
    """Entries of tensors in a folder.

    Args:
        folder: The folder; created when first written.
        limit: Maximum bytes of all entries together.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def open(self, key: str) -> list[Mapped] | None:
        """Returns an entry's tensors; None if it is missing or damaged, as far as this is verified here.

        The first GiB of each tensor is verified, the rest when it is read.
        """
        entry = self.folder / key
        if not self.has(key):
            return None
        try:
            meta = json.loads((entry / "meta.json").read_text())
            found = []
            for number, part in enumerate(meta["parts"]):
                values = _map(entry, number, tuple(part["shape"]), getattr(torch, part["dtype"]), create=False)
                found.append(Mapped(values, Checksums(values, part["checksums"], entry)))
        except (OSError, ValueError, KeyError, RuntimeError):
            found = []
        if not found or not all(each.verify(AT_ONCE) for each in found):
            self.remove(key)
            return None
        with contextlib.suppress(OSError):
            os.utime(entry / "meta.json")
        return found

    def has(self, key: str) -> bool:
        """Returns whether there is a complete entry, damaged or not."""
        return (self.folder / key / "meta.json").is_file()

    def remove(self, key: str) -> None:
        """Removes an entry; tensors mapped to it stay readable."""
        shutil.rmtree(self.folder / key, ignore_errors=True)

    def room(self, size: int) -> str | None:
        """Returns why an entry of `size` bytes does not fit, or None."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            return f"{self.folder} cannot be written ({error.strerror})"
        if not os.access(self.folder, os.W_OK):
            return f"{self.folder} cannot be written"
        if size > self.limit:
            return f"{size / 1e9:.1f} GB are more than --cache.disk_gb {self.limit / 1e9:g}"
        # entries that would be removed count as free space
        if size > free * 0.9 + sum(_size(entry) for entry in self._entries()):
            return f"{size / 1e9:.1f} GB do not fit in {self.folder}"
        return None

    def begin(
        self, key: str, token: str, specs: Sequence[Spec], create: bool = True, rank: int = 0, size: int = 0
    ) -> list[Any]:
        """Maps the tensors of an incomplete entry; one process creates them, others join.

        Args:
            key: The entry's key.
            token: Unique to this attempt, even if earlier ones were killed.
            specs: Shape and type of each tensor.
            create: Whether this is the process that creates them.
            rank: The process's rank on its machine.
            size: Maximum bytes of growing tensors.

        Returns:
            Tensors, and a `Growing` for each spec without a shape.
        """
        part = self._part(key, token)
        if create:
            self._evict(size + size_of(specs))
            part.mkdir(parents=True)
        try:
            return [
                Growing(dtype, part / f"{n}.bin", rank) if shape is None else _map(part, n, shape, dtype, create)
                for n, (shape, dtype) in enumerate(specs)
            ]
        except OSError:
            self.drop(key, token)
            raise

    def commit(self, key: str, token: str, tensors: Sequence[Tensor]) -> None:
        """Renames a complete entry to its final name; drops it if another process has committed the key meanwhile."""
        part = self._part(key, token)
        meta = [
            {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "checksums": _checksums(t)}
            for t in tensors
        ]
        (part / "meta.json").write_text(json.dumps({"parts": meta}))
        try:
            part.rename(self.folder / key)
        except OSError:
            self.drop(key, token)

    def drop(self, key: str, token: str) -> None:
        """Removes an incomplete entry; tensors mapped to it stay readable."""
        shutil.rmtree(self._part(key, token), ignore_errors=True)

    def _part(self, key: str, token: str) -> Path:
        return self.folder / f".{key}.{token}.part"

    def _entries(self) -> list[Path]:
        """Returns the complete entries, the least recently used first."""
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


class Checksums:
    """Verifies the blocks of a mapped tensor, each when it is first read.

    Args:
        tensor: The tensor.
        known: The checksum of each block.
        entry: The entry's folder.

    Raises:
        ValueError: The number of checksums does not match the tensor.
    """

    def __init__(self, tensor: Tensor, known: Sequence[int], entry: Path) -> None:
        self.bytes, self.known, self.entry = _bytes(tensor), list(known), entry
        self.pending = np.ones(len(known), bool)
        if len(known) != _blocks(tensor.nbytes):
            raise ValueError(f"{entry} has {len(known)} checksums for {tensor.nbytes} bytes")

    def verify(self, start: int, end: int) -> bool:
        """Returns whether the blocks of the bytes `start` to `end` that are still unread are as they were written."""
        first = start // BLOCK
        for number in (first + np.flatnonzero(self.pending[first : _blocks(end)])).tolist():
            if zlib.crc32(self.bytes[number * BLOCK : (number + 1) * BLOCK]) != self.known[number]:
                return False
            self.pending[number] = False
        return True

    def require(self, starts: Tensor, ends: Tensor) -> None:
        """Verifies the blocks of these ranges of bytes, (B,) each.

        Raises:
            UserError: One is damaged; the entry has been removed.
        """
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if end > start and not self.verify(start, end):
                shutil.rmtree(self.entry, ignore_errors=True)
                raise UserError(
                    f"cache: {self.entry} was damaged on disk and has been removed; start again, or resume the run"
                )


@dataclass
class Mapped:
    """A tensor of an entry; its checksums, if parts of it still have to be verified."""

    values: Tensor
    checksums: Checksums | None = None

    def verify(self, size: int | None = None) -> bool:
        """Returns whether the first `size` bytes, by default all, are as they were written."""
        whole = self.values.nbytes
        if self.checksums and not self.checksums.verify(0, whole if size is None else min(size, whole)):
            return False
        if self.checksums and not self.checksums.pending.any():
            self.checksums = None
        return True


class Growing:
    """A flat tensor to which each process appends its own values.

    Args:
        dtype: The values' type.
        file: The final file; None keeps the values of a single process in memory.
        rank: The process's rank on its machine.
    """

    def __init__(self, dtype: torch.dtype, file: Path | None = None, rank: int = 0) -> None:
        self.dtype, self.file, self.rank, self.size = dtype, file, rank, 0
        self.parts: list[Tensor] = []
        self.stream = self._own(rank).open("wb") if file else None

    def append(self, values: Tensor) -> int:
        """Appends values and returns where they start in this process's part."""
        start, flat = self.size, values.detach().reshape(-1).cpu()
        self.size += flat.numel()
        if self.stream:
            self.stream.write(cast(Any, flat.view(torch.uint8).numpy()))
        else:
            self.parts.append(flat.clone())
        return start

    def close(self) -> None:
        """Ends this process's part; the next steps require that all processes have done so."""
        if self.stream:
            self.stream.close()

    def offset(self) -> int:
        """Returns where this process's part will start."""
        return sum(self._own(rank).stat().st_size for rank in range(self.rank)) // self.dtype.itemsize

    def join(self, processes: int) -> None:
        """Concatenates the parts of all processes; called by one process."""
        if self.file is None:
            return
        with self._own(0).open("ab") as whole:
            for rank in range(1, processes):
                with self._own(rank).open("rb") as part:
                    shutil.copyfileobj(part, whole, 1 << 24)
                self._own(rank).unlink()
        self._own(0).rename(self.file)

    def tensor(self) -> Tensor:
        """Returns all values, (total,)."""
        if self.file is None:
            return torch.cat(self.parts) if self.parts else torch.empty(0, dtype=self.dtype)
        size = self.file.stat().st_size // self.dtype.itemsize
        return _map(self.file.parent, int(self.file.stem), (size,), self.dtype, create=False)

    def _own(self, rank: int) -> Path:
        assert self.file is not None
        return self.file.with_suffix(f".{rank}")


def size_of(specs: Sequence[Spec]) -> int:
    """Returns the bytes of all tensors with known shapes."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs if shape is not None)


def _map(entry: Path, number: int, shape: tuple[int, ...], dtype: torch.dtype, create: bool) -> Tensor:
    file, size = entry / f"{number}.bin", math.prod(shape)
    if create:
        with file.open("wb") as whole:
            if size and hasattr(os, "posix_fallocate"):  # writing to a mapped file on a full disk kills the process
                os.posix_fallocate(whole.fileno(), 0, size * dtype.itemsize)
    if not create and file.stat().st_size != size * dtype.itemsize:
        raise ValueError(f"{file} is cut short")
    # an empty file cannot be mapped
    flat: Any = torch.from_file(str(file), shared=True, size=size, dtype=dtype) if size else torch.empty(0, dtype=dtype)
    mapped: Tensor = flat.view(shape)
    return mapped


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _checksums(tensor: Tensor) -> list[int]:
    whole = _bytes(tensor)
    return [zlib.crc32(whole[start : start + BLOCK]) for start in range(0, len(whole), BLOCK)]


def _used(entry: Path) -> float:
    with contextlib.suppress(OSError):
        return (entry / "meta.json").stat().st_mtime
    return 0.0


def _size(entry: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in entry.iterdir())
    return 0
