"""Checkpoints: whole files, and what is in them."""
