"""The one exception for what a user can mend: `tl` shows it as a sentence and stops with code 2."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """A mistake in the input; its text names the file, field or value and what to do."""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those behind it, each once: raised again in another thread, one can be behind itself."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def disk_full(error: BaseException | None) -> bool:
    """Whether there was no room for a file, or none left for this user's, or for a file so large."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def closest(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the known name nearest to `name`, or an empty string."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f" (did you mean {by_lower[found[0]]}?)" if found else ""


def short(names: Iterable[object]) -> str:
    """The first six names, for a sentence."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:6]) + (", ..." if len(listed) > 6 else "")
