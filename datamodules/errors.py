"""The one exception for what a user can mend in the data or its settings."""

from __future__ import annotations


class DataError(Exception):
    """A mistake in the data or its settings; its text names the file, field or value and what to do."""
