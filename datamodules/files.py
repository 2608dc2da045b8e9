"""Samples that lie in files of their own and are read when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from torch.utils.data import Dataset

from datamodules.errors import DataError
from datamodules.splits import content_hash, log

Samples = TypeVar("Samples", bound="FileSamples")


class FileSamples(Dataset[Any]):
    """Samples of one split, by path; a subclass writes `__getitem__`, `check` and `taken`.

    Attributes:
        what: What messages call the files.
        skip: The option that leaves out those that cannot be read.
        ids: The paths.
        targets: The class numbers, or real values.
        reader: How a file is read.
    """

    what: ClassVar[str] = "files"
    skip: ClassVar[str] = ""

    def __init__(self, paths: Sequence[Path | str], targets: np.ndarray[Any, Any], reader: Any) -> None:
        self.ids = [str(path) for path in paths]
        self.targets, self.reader = targets, reader

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """What names its contents: a file's size, and when its contents, and when its entry, last changed."""
        stats = zip(self.ids, self.stats(), strict=True)
        files = [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]
        return content_hash(files, self.targets, self.reader)

    def stats(self) -> list[os.stat_result]:
        """What the file system says of each file.

        Raises:
            DataError: One is not there any more.
        """
        try:
            return [os.stat(path) for path in self.ids]
        except OSError as error:
            raise DataError(f"{error.filename}: it cannot be read any more ({error.strerror})") from error

    def check(self, path: Path) -> None:
        """Reads a file as cheaply as finds out whether it can be read.

        Raises:
            DataError: It cannot.
        """
        raise NotImplementedError

    def taken(self: Samples, rows: Sequence[int]) -> Samples:
        """The same with these rows only."""
        raise NotImplementedError

    def without_bad(self: Samples, field: str) -> Samples:
        """The same without the files that cannot be read, and a line that counts them."""

        def readable(path: str) -> bool:
            try:
                self.check(Path(path))
            except DataError as error:
                log.warning("skipped: %s", error)
                return False
            return True

        with ThreadPoolExecutor() as pool:
            good = list(pool.map(readable, self.ids))
        if not any(good):
            raise DataError(f"{field}: none of its {len(good)} {self.what} can be read")
        if not all(good):
            log.warning("%s: skipped %d of %d %s", field, good.count(False), len(good), self.what)
        return self.taken(np.flatnonzero(good).tolist())

    @contextmanager
    def with_advice(self) -> Iterator[None]:
        """Adds to an error inside what to do about a file that cannot be read."""
        try:
            yield
        except DataError as error:
            raise DataError(f"{error}; mend or remove it, or pass --data.{self.skip} skip") from error
