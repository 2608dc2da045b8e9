"""Checkpoints: atomic files, and their contents."""
