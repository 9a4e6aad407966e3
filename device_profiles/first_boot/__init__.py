"""What a board does at boot before its service starts: grow its root file system, and apply flexspec.toml.

`flexspec.toml` is on the FAT partition, so that any computer with a card reader can change a board's configuration.
"""
