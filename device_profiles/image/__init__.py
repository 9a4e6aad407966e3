"""Images for boards: built from Debian packages, or a stock Raspberry Pi OS that installs the runtime at first boot."""
