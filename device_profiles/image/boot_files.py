"""The files of the boot partition: kernel, initial RAM disk, firmware, boot loader and a flexspec.toml to fill in."""

from __future__ import annotations

import shutil
from pathlib import Path

from device_profiles.first_boot.board_file import FILE_NAME
from device_profiles.image.disk import ROOT_LABEL
from device_profiles.image.kernel import Kernel
from device_profiles.image.recipe import ImageRecipe

KERNEL_NAME, INITRD_NAME = "vmlinuz", "initrd.img"
# For all boards, before their own part. A board whose kernel fails restarts; memory is accounted for, so that the
# service's limits hold.
COMMAND_LINE = f"root=LABEL={ROOT_LABEL} ro rootwait loglevel=4 panic=30 cgroup_enable=memory"
CONFIG_TXT = f"""\
# https://www.raspberrypi.com/documentation/computers/config_txt.html
arm_64bit=1
# Names of device trees as the Linux kernel has them.
upstream_kernel=1
kernel={KERNEL_NAME}
initramfs {INITRD_NAME} followkernel
enable_uart=1
"""
EXTLINUX = """\
default flexspec
label flexspec
    linux /{kernel}
    initrd /{initrd}
    append {command_line}
"""
LOADER_ENTRY = """\
title FlexSpec
linux /{kernel}
initrd /{initrd}
options {command_line}
"""
# Directories below the unpacked packages raspi-firmware and systemd-boot-efi.
FIRMWARE, EFI_LOADER = "usr/lib/raspi-firmware", "usr/lib/systemd/boot/efi/systemd-bootaa64.efi"
TEMPLATE = f"""\
# {FILE_NAME}: what this board is told at boot. Remove the # in front of what you need, and give it your own values.
# Errors are reported in flexspec-errors.txt beside this file. It may be changed at any time; the board reads it at the
# next boot. Secrets are moved to the board, and removed from here.

[board]
# hostname = "kitchen"
# timezone = "Europe/Berlin"

# [wifi]
# ssid = "home"
# password = "..."
# country = "DE"

# [ssh]
# keys = ["ssh-ed25519 AAAA... me@laptop"]      # may log in as root

# [secrets]
# verifier_token = "..."
# api_key = "..."                               # for the clients of the board

# [verifier]
# urls = ["https://verifier.example"]
# insecure = true                               # for a verifier with http:// in your own network

# [service]
# host = "0.0.0.0"                              # for clients on other machines; give it an api_key, then

[planner]
{{profile}}# objective = "latency"                         # or cloud, energy, balanced
"""


def boot_directory(recipe: ImageRecipe, kernel: Kernel, initrd: bytes, unpacked: Path, directory: Path) -> None:
    """Write the files of the boot partition into the new directory `directory`.

    Args:
        unpacked: where the packages raspi-firmware or systemd-boot-efi are unpacked.
    """
    directory.mkdir()
    shutil.copyfile(kernel.image, directory / KERNEL_NAME)
    (directory / INITRD_NAME).write_bytes(initrd)
    command_line = f"{COMMAND_LINE} {recipe.command_line}"
    names = {"kernel": KERNEL_NAME, "initrd": INITRD_NAME, "command_line": command_line}
    for pattern in recipe.device_trees:
        for path in sorted(kernel.device_trees.glob(f"{pattern}.dtb")):
            shutil.copyfile(path, directory / path.name)
    if recipe.raspberry_pi:
        for name in recipe.firmware:
            shutil.copyfile(unpacked / FIRMWARE / name, directory / name)
        (directory / "config.txt").write_text(CONFIG_TXT)
        (directory / "cmdline.txt").write_text(f"{command_line}\n")
    else:
        for name, text in (
            ("extlinux/extlinux.conf", EXTLINUX.format(**names)),
            ("loader/loader.conf", "default flexspec.conf\ntimeout 0\n"),
            ("loader/entries/flexspec.conf", LOADER_ENTRY.format(**names)),
        ):
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (directory / "EFI/BOOT").mkdir(parents=True)
        shutil.copyfile(unpacked / EFI_LOADER, directory / "EFI/BOOT/BOOTAA64.EFI")
    profile = f'profile = "{recipe.profile}"\n' if recipe.profile else ""
    (directory / FILE_NAME).write_text(TEMPLATE.format(profile=profile))


def radio_firmware(recipe: ImageRecipe, unpacked: Path) -> list[Path]:
    """Return the firmware files of the board's radios, below the unpacked package firmware-brcm80211."""
    root = unpacked / "usr/lib/firmware"
    return sorted({path for pattern in recipe.radio_firmware for path in root.glob(pattern)})
