"""systemd services of the board and the verifier: unit files, their installation, and their state.

`cloud_verifier` uses this package, too.
"""
