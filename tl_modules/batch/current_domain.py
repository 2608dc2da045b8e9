"""Which rows of the batch that is passing through the backbone belong to which domain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_passing: ContextVar[Sequence[tuple[str, int]]] = ContextVar("passing", default=())


@contextmanager
def passing(rows: Sequence[tuple[str, int]]) -> Iterator[None]:
    """Inside, the backbone is given `rows`: ("source" or "target", how many), in their order."""
    token = _passing.set(rows)
    try:
        yield
    finally:
        _passing.reset(token)


def domain_rows() -> Sequence[tuple[str, int]]:
    """What is passing; empty where nobody says, which stands for the domain that the model is for, the target."""
    return _passing.get()
