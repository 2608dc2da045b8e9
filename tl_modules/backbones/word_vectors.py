"""Reads files of word vectors as a stream, so that only the vectors that are kept are in memory.

    GloVe             word 0.1 -0.2 ...            one word per line
    word2vec, text    400000 300                   and then the same
    word2vec, binary  400000 300                   and then `word `, 300 float32, with or without a line end
    .npz              words (V,), vectors (V, D)

The format is detected from the content, except for .gz and .npz.
"""

from __future__ import annotations

import gzip
import os
import zipfile
import zlib
from array import array
from collections.abc import Callable, Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from tl_modules.checkpoints.files import fill_in
from tl_modules.errors import UserError

LONGEST_WORD = 10_000  # bytes; a longer one is not a word


class Malformed(Exception):
    """Raised for a malformed file; the message says what is wrong."""


def read_vectors(
    file: str | os.PathLike[str], most: int | None = None, only: Collection[str] | None = None
) -> tuple[list[str], Tensor]:
    """Reads words and their vectors.

    Args:
        file: Text in GloVe's or word2vec's format, word2vec's binary format, either also .gz, or .npz.
        most: Keeps at most this many words from the start of the file; None: all.
        only: The words to keep; None: all.

    Returns:
        V distinct words, and their vectors (V + 1, D), float32; row 0 is for no word.

    Raises:
        UserError: The file cannot be read, or has a malformed line.
    """
    path = fill_in(file)
    if not path.is_file():
        raise UserError(f"name: there is no file {path} of word vectors")
    kept: dict[str, None] = {}
    values, width = array("f"), 0
    try:
        for word, vector in _of_npz(path) if path.suffix == ".npz" else _of_stream(path):
            if word in kept or (only is not None and word not in only):
                continue
            row = vector()
            if not kept:
                width, values = len(row), array("f", bytes(row.nbytes))
            kept[word] = None
            values.frombytes(row.tobytes())  # grows in place: a list of rows would need twice the memory
            if most is not None and len(kept) >= most:
                break
    except (Malformed, OSError, EOFError, KeyError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"name: {path} is not a file of word vectors ({str(error).splitlines()[0]})") from error
    if not kept:
        raise UserError(f"name: {path} has none of the requested words")
    return list(kept), torch.frombuffer(values, dtype=torch.float32).view(-1, width)


Row = tuple[str, Callable[[], Any]]  # a word and a function that reads its vector, since most are not kept


def _of_npz(path: Path) -> Iterator[Row]:
    with np.load(path, allow_pickle=False) as file:
        words, vectors = file["words"], file["vectors"]
    if vectors.ndim != 2 or words.shape != vectors.shape[:1]:
        raise Malformed(f"words and vectors have shapes {words.shape} and {vectors.shape}, not (V,) and (V, D)")
    for row, word in enumerate(words.tolist()):
        yield str(word), lambda row=row: _finite(vectors[row].astype(np.float32), f"row {row}")  # type: ignore[misc]


def _of_stream(path: Path) -> Iterator[Row]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as opened:
        stream = cast(BinaryIO, opened)
        first = stream.readline(1 << 20)
        numbers = first.split()
        if len(numbers) != 2 or not all(part.isdigit() for part in numbers):
            yield from _of_lines(chain([first], stream), len(numbers) - 1, 1)
            return
        count, width = map(int, numbers)
        second = stream.readline(1 << 20)
        if _is_text(second, width):
            yield from _of_lines(chain([second], stream), width, 2)
        else:
            yield from _of_bytes(second, stream, count, width)


def _is_text(line: bytes, width: int) -> bool:
    try:
        return len([float(part) for part in line.split()[1:]]) == width
    except ValueError:
        return False


def _of_lines(lines: Any, width: int, first: int) -> Iterator[Row]:
    if width < 1:
        raise Malformed("line 1 has no word and numbers")
    for number, line in enumerate(lines, first):
        parts = line.rstrip().rsplit(b" ", width)
        if len(parts) != width + 1:
            if line.isspace():
                continue
            raise Malformed(f"line {number} has {len(parts) - 1} numbers, not {width}")
        yield _text(parts[0], f"line {number}"), lambda p=parts, n=number: _numbers(p, n)  # type: ignore[misc]


def _numbers(parts: list[bytes], number: int) -> Any:
    try:
        return _finite(np.array(parts[1:], dtype=np.float32), f"line {number}")
    except ValueError as error:
        raise Malformed(f"line {number} has a value that is not a number: {str(error)[-60:]}") from error


def _of_bytes(before: bytes, stream: BinaryIO, count: int, width: int) -> Iterator[Row]:
    """Reads binary vectors; `before` is the part of the words that was already read."""
    buffer, start, size = before, 0, 4 * width
    for number in range(1, count + 1):
        while (end := buffer.find(b" ", start)) < 0 or len(buffer) < end + 1 + size:
            if end < 0 and len(buffer) - start > LONGEST_WORD:
                raise Malformed(f"word {number} of {count} has no end")
            if not (more := stream.read(1 << 20)):
                raise Malformed(f"word {number} of {count} is cut off")
            buffer, start = buffer[start:] + more, 0
        word, raw = buffer[start:end].lstrip(b"\n"), buffer[end + 1 : end + 1 + size]
        start = end + 1 + size
        where = f"word {number}"
        yield _text(word, where), lambda raw=raw, where=where: _finite(np.frombuffer(raw, "<f4"), where)  # type: ignore[misc]


def _text(word: bytes, where: str) -> str:
    try:
        return word.decode()
    except UnicodeDecodeError as error:
        raise Malformed(f"{where} begins with bytes that are not UTF-8") from error


def _finite(vector: Any, where: str) -> Any:
    if not np.isfinite(vector).all():
        raise Malformed(f"{where} has a number that is not finite")
    return vector
