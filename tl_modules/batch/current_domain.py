"""Which rows of the batch in the backbone belong to which domain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_passing: ContextVar[Sequence[tuple[str, int]]] = ContextVar("passing", default=())


@contextmanager
def passing(rows: Sequence[tuple[str, int]]) -> Iterator[None]:
    """Declares the rows that pass through the backbone in this context: ("source" or "target", count), in order."""
    token = _passing.set(rows)
    try:
        yield
    finally:
        _passing.reset(token)


def domain_rows() -> Sequence[tuple[str, int]]:
    """Returns the rows of the current batch; empty if undeclared, and then all belong to the target."""
    return _passing.get()
