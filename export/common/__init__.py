"""Helpers that all rooms of `export` share: atomic directories, progress display."""
