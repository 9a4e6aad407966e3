"""Tells people without a login what is wrong with flexspec.toml: on the console, in a file beside it, and by an LED."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

ERRORS_NAME = "flexspec-errors.txt"
# Shown above the login prompt of every console, with the board's addresses.
ISSUE = "etc/issue.d/flexspec.issue"
ADDRESSES = "Addresses: \\4 \\6\n"
# Names of the LED that a board blinks with when it uses its card: Raspberry Pi, now and formerly; other boards.
LEDS = ("ACT", "led0", "*:activity", "*:status", "*:heartbeat", "*:sys")
# Slow, so that it is told apart from activity. Chosen.
BLINK_MILLISECONDS = 1500


def report(root: Path, boot: Path, errors: Sequence[str], sysfs: Path = Path("/sys")) -> None:
    """Show the errors, or remove what was shown of earlier ones. Never raises: a board starts anyway.

    Args:
        root: the root file system.
        boot: the FAT partition.
        sysfs: where the kernel shows LEDs.
    """
    text = "".join(f"{line}\n" for line in errors)
    with contextlib.suppress(OSError):
        if text:
            # Windows' editor shows line ends of its own kind only, in older versions.
            (boot / ERRORS_NAME).write_text(text, encoding="utf-8", newline="\r\n")
        else:
            (boot / ERRORS_NAME).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        issue = root / ISSUE
        issue.parent.mkdir(parents=True, exist_ok=True)
        # agetty replaces sequences that begin with a backslash.
        issue.write_text(text.replace("\\", "\\\\") + ADDRESSES, encoding="utf-8")
    if text:
        blink(sysfs)


def blink(sysfs: Path) -> bool:
    """Blink the board's LED slowly. Returns whether it has one."""
    directory = sysfs / "class/leds"
    for led in (led for pattern in LEDS for led in sorted(directory.glob(pattern))):
        with contextlib.suppress(OSError):
            (led / "trigger").write_text("timer")
            # The kernel makes these two files when the trigger is set.
            for name in ("delay_on", "delay_off"):
                (led / name).write_text(str(BLINK_MILLISECONDS))
            return True
    return False
