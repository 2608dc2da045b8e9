"""Files packed by gzip, bzip2, xz or zip, read as what they hold."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zipfile
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import IO

from datamodules.errors import DataError
from datamodules.folders import is_litter

PACKED: dict[bytes, Callable[[bytes], bytes]] = {  # by how files begin
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ\0": lzma.decompress,
}
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zip")


def unpacked_name(name: str) -> Path:
    """Returns the name of a file without the suffix of its compression."""
    path = Path(name)
    return path.with_suffix("") if path.suffix.lower() in PACKED_SUFFIXES else path


def unpacked(path: Path, where: str) -> Path | bytes:
    """Returns the contents of a packed file, and otherwise the path.

    Raises:
        DataError: An archive holds several files.
    """
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            inside = [each.filename for each in archive.infolist() if not each.is_dir()]
            files = [name for name in inside if not any(map(is_litter, name.split("/")))]
            if len(files) != 1:
                raise DataError(f"{where} holds {len(files)} files, not one table; unpack it and name one of them")
            return archive.read(files[0])
    with path.open("rb") as file:
        start = file.read(6)
    unpack = next((unpack for mark, unpack in PACKED.items() if start.startswith(mark)), None)
    return path if unpack is None else unpack(path.read_bytes())


def open_bytes(source: Path | bytes) -> IO[bytes]:
    """Opens a path or contents."""
    return BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def open_text(source: Path | bytes) -> TextIOWrapper:
    """Opens a path or contents to read UTF-8, without a byte order mark, with line ends as they are."""
    return TextIOWrapper(open_bytes(source), encoding="utf-8-sig", newline="")
