"""The exception for mistakes in the data or its settings that a user can fix, and the check for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Collection


class DataError(Exception):
    """A mistake in the data or its settings; the message names the file, field or value and says what to do."""


def printable(name: str) -> str:
    """Returns a file name that can be printed and encoded: bytes that are not UTF-8 are escaped."""
    return name.encode(errors="backslashreplace").decode()


def check_known(field: str, name: str, known: Collection[str], what: str = "domain") -> None:
    """Rejects an unknown name and lists the known ones.

    Raises:
        DataError: The name is not in `known`.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise DataError(f"{field}: there is no {what} {name}{hint}; there are {', '.join(known) or 'none'}")
