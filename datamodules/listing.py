"""Lists files and what is known of each: from its folders, its name, or a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np

from datamodules.errors import DataError, check_known
from datamodules.files import Paths
from datamodules.folders import files_below
from datamodules.splits import SPLITS, log, read_split, split_of

Array = np.ndarray[Any, Any]
# the official split lists of Speech Commands and similar data sets
LISTS = {"val": "validation_list.txt", "test": "testing_list.txt"}
CONDITION = re.compile(r"\s*(\w+)\s*(!=|<=|>=|=|<|>)\s*(.+?)\s*")
COMPARE = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}


@dataclass
class Listing:
    """Files and their fields.

    Attributes:
        where: The folder or table, for messages.
        paths: The files, unopened.
        fields: The texts of each field, one per file; for folders `label` and `split`.
        unknown: Why there are no fields.
    """

    where: str
    paths: Paths
    fields: Mapping[str, Array]
    unknown: str = ""

    def field(self, argument: str, name: str) -> Array:
        """Returns the texts of a field that `argument` names.

        Raises:
            DataError: The field does not exist, or is empty for a file.
        """
        if not self.fields:
            raise DataError(f"{argument}: {self.unknown}")
        check_known(argument, name, self.fields, "field")
        for row in np.flatnonzero(self.fields[name] == "")[:1]:
            raise DataError(f"{argument}: {self.where}: {self.paths[row]} has no {name}; fill it in or remove the file")
        return self.fields[name]

    def taken(self, rows: Array) -> Listing:
        """Returns the files of these rows."""
        fields = {name: texts[rows] for name, texts in self.fields.items()}
        return Listing(self.where, Paths(self.paths[row] for row in rows), fields)

    def matches(self, argument: str, condition: str) -> Array:
        """Returns which files fulfil a condition, e.g. index<5, speaker=theo,lucas or speaker!=theo, (N,) bool.

        Raises:
            DataError: The condition is malformed, its field is unknown, or < or > compares text.
        """
        parts = CONDITION.fullmatch(condition)
        if parts is None:
            raise DataError(f"{argument}: {condition} is not a condition like index<5, speaker=theo or speaker!=theo")
        name, sign, value = parts.groups()
        texts = self.field(argument, name)
        if sign in ("=", "!="):
            return np.isin(texts, [part.strip() for part in value.split(",")], invert=sign == "!=")
        try:
            found: Array = COMPARE[sign](texts.astype(float), float(value))
        except ValueError as error:
            raise DataError(f"{argument}: {condition} compares numbers, but {self.where}: {error}") from error
        return found

    def splits(self, conditions: Mapping[str, str]) -> dict[str, Array]:
        """Returns the rows of each split, as defined by conditions or a field `split`; otherwise all as "unsplit"."""
        chosen = {split: self.matches(f"where.{split}", text) for split, text in conditions.items()}
        if not chosen and "split" in self.fields:
            known, inverse = np.unique(self.field("split", "split"), return_inverse=True)
            ours = np.array([read_split("split", str(text)) for text in known])[inverse]
            chosen = {split: ours == split for split in SPLITS if (ours == split).any()}
        if not chosen:
            return {"unsplit": np.arange(len(self.paths))}
        if "train" not in chosen:
            chosen = {"train": ~np.logical_or.reduce(list(chosen.values())), **chosen}
        found, taken = dict[str, Array](), np.zeros(len(self.paths), bool)
        for split in ("test", "val", "train"):  # test comes first: a test file is never trained on
            if split in chosen:
                found[split], taken = np.flatnonzero(chosen[split] & ~taken), taken | chosen[split]
        for split, rows in found.items():
            if not len(rows):
                raise DataError(f"{self.where} has no file for {split}; check --data.where")
        return found


def list_files(root: Path, extensions: Sequence[str], pattern: str | None, column: str) -> Listing:
    """Lists files and their fields, without opening a file.

    Args:
        root: A folder, or a table (see `read_frame`) whose `column` holds paths relative to the table's folder.
        extensions: The file extensions, in lower case.
        pattern: Names the parts of file names, e.g. {label}_{speaker}_{index}.wav, or of paths below `root`.
        column: The table's column of paths.

    Raises:
        DataError: There are no files, or the pattern is malformed.
    """
    where = str(root)
    if root.is_file():
        return _from_table(root, column)
    below = [name for name in files_below(root) if not name.startswith("_") and "/_" not in name]
    names = sorted(name for name in below if name.lower().endswith(tuple(extensions)))
    if not names:
        raise DataError(f"{where} has no files ending in {', '.join(extensions)}")
    others = [name for name in below if not name.lower().endswith(tuple(extensions)) and name not in LISTS.values()]
    if others:
        log.warning("%s: left out %d files that are not recordings, e.g. %s", where, len(others), others[0])
    paths = Paths(root / name for name in names)
    if pattern is not None:
        return _by_pattern(names, paths, where, pattern)
    parts = [name.split("/") for name in names]
    split_folders = all(len(each) > 1 and split_of(each[0]) for each in parts) and any(len(each) > 2 for each in parts)
    fields: dict[str, Array] = {}
    if split_folders or all(len(each) > 1 for each in parts):  # "" if a split has no class folders
        labels = [_class_of(each, split_folders) for each in parts]
        known = {"", *labels}
        for other in others:
            if (name := _class_of(other.split("/"), split_folders)) not in known:
                raise DataError(f"{where}: class {name} is empty: none of its files is a recording, e.g. {other}")
        fields["label"] = np.array(labels)
    lists = {split: root / name for split, name in LISTS.items() if (root / name).is_file()}
    if split_folders:
        fields["split"] = np.array([each[0] for each in parts])
    elif lists:
        listed = {line: split for split, file in lists.items() for line in file.read_text().split()}
        fields["split"] = np.array([listed.get(name, "train") for name in names])
    unknown = f"{where} has no class folders; it needs {where}/<class>/*{extensions[0]}, or --data.pattern"
    return Listing(where, paths, fields, unknown)


def _class_of(parts: Sequence[str], split_folders: bool) -> str:
    """Returns the class folder of a path, or ""."""
    return "/".join(parts[split_folders:-1]).partition("/")[0]


def _by_pattern(names: Sequence[str], paths: Paths, where: str, pattern: str) -> Listing:
    regex, fields = "", list[str]()
    try:
        for text, name, form, conversion in Formatter().parse(pattern):
            if name is not None and (not name.isidentifier() or form or conversion or name in fields):
                raise ValueError(f"{{{name}}} is not a name, or occurs twice")
            regex += re.escape(text) + (f"(?P<{name}>[^/]+?)" if name else "")
            fields += [name] if name else []
    except ValueError as error:
        raise DataError(f"pattern: {pattern} is not like {{label}}_{{speaker}}_{{index}}.wav ({error})") from error
    compiled = re.compile(regex)
    found = [compiled.fullmatch(name if "/" in pattern else name.rpartition("/")[2]) for name in names]
    rows = [row for row, match in enumerate(found) if match]
    if not rows:
        return Listing(where, paths, {}, f"no file name matches {pattern}; the first is {names[0]}")
    if len(rows) < len(names):
        other = names[next(row for row, match in enumerate(found) if not match)]
        log.warning("%s: left out %d files not matching %s, e.g. %s", where, len(names) - len(rows), pattern, other)
    texts = [match.groupdict() for match in found if match]
    named = {name: np.array([text[name] for text in texts]) for name in fields}
    return Listing(where, Paths(paths[row] for row in rows), named)


def _from_table(table: Path, column: str) -> Listing:
    from datamodules.frames import read_frame

    frame = read_frame(table, str(table), [column], names=None)
    check_known("file", column, frame.columns, "column")
    fields = {
        name: np.array(["" if cell is None else str(cell) for cell in frame[name].to_list()], dtype=str)
        for name in frame.columns
    }
    paths = Paths(table.parent / name for name in fields.pop(column))
    return Listing(str(table), paths, fields, f"{table} has no column beside {column}")
