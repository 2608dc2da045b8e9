"""The `tl` command."""
