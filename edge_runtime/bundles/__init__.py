"""Bundles on the board: installation, verification, switching and fallback."""
