"""Bundles on the board: installed, checked, switched to, fallen back from."""
