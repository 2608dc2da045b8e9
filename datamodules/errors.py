"""The one exception for what a user can mend in the data or its settings, and the mistake that is made most."""

from __future__ import annotations

import difflib
from collections.abc import Collection


class DataError(Exception):
    """A mistake in the data or its settings; its text names the file, field or value and what to do."""


def printable(name: str) -> str:
    """A name of a file as it can be said and written: bytes that are no UTF-8 are spelt out."""
    return name.encode(errors="backslashreplace").decode()


def check_known(field: str, name: str, known: Collection[str], what: str = "domain") -> None:
    """Refuses a name that is not known, and says which are.

    Raises:
        DataError: It is not among them.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise DataError(f"{field}: there is no {what} {name}{hint}; there are {', '.join(known) or 'none'}")
