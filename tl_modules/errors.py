"""The exception for mistakes a user can fix: `tl` prints its message and exits with code 2."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """A mistake in the input; the message names the file, field or value and says what to do."""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and its causes, each once: re-raised in another thread, it can be its own cause."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def disk_full(error: BaseException | None) -> bool:
    """Returns whether an error means a full disk, an exhausted quota, or a file too large for the system."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def closest(name: str, known: Iterable[str]) -> str:
    """Returns ` (did you mean X?)` with the known name closest to `name`, or an empty string."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f" (did you mean {by_lower[found[0]]}?)" if found else ""


def short(names: Iterable[object]) -> str:
    """Lists the first six names for a message."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:6]) + (", ..." if len(listed) > 6 else "")
