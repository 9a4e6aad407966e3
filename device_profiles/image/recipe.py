"""Recipes of images: what differs between boards, as data. One TOML file per board in `recipes/`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from device_profiles.image.packages import SUITE
from edge_runtime.protocol.errors import InputError

RECIPES = Path(__file__).with_name("recipes")
PageSize = Literal["4k", "16k"]

# Installed on every board, in addition to Debian's essential packages and apt. Without recommended packages.
PACKAGES = (
    *("systemd-sysv", "udev", "dbus", "kmod", "systemd-timesyncd", "systemd-zram-generator", "tzdata"),
    *("network-manager", "wpasupplicant", "iw", "rfkill", "wireless-regdb", "iproute2", "iputils-ping", "curl"),
    *("openssh-server", "ca-certificates", "python3", "libstdc++6"),
    # Grow and check the file systems.
    *("e2fsprogs", "fdisk", "dosfstools"),
)
# For LTE modems; NetworkManager drives them through it.
MODEM_PACKAGES = ("modemmanager",)

# Directories of kernel modules that no board of ours needs, relative to `kernel/`. They are half of all modules.
LEFT_OUT_MODULES = (
    "drivers/accel",
    "drivers/ata",
    "drivers/comedi",
    "drivers/gpu/drm/amd",
    "drivers/gpu/drm/nouveau",
    "drivers/gpu/drm/radeon",
    "drivers/gpu/drm/xe",
    "drivers/iio",
    "drivers/infiniband",
    "drivers/input/joystick",
    "drivers/isdn",
    "drivers/media",
    "drivers/message",
    "drivers/net/ethernet/broadcom/bnx2x",
    "drivers/net/ethernet/chelsio",
    "drivers/net/ethernet/intel/ice",
    "drivers/net/ethernet/mellanox",
    "drivers/net/ethernet/netronome",
    "drivers/net/ethernet/qlogic",
    "drivers/net/ethernet/sfc",
    "drivers/net/wireless/ath/ath11k",
    "drivers/net/wireless/ath/ath12k",
    "drivers/net/wireless/intel",
    "drivers/scsi",
    "drivers/staging",
    "drivers/target",
    "fs/bcachefs",
    "fs/btrfs",
    "fs/ceph",
    "fs/gfs2",
    "fs/nfsd",
    "fs/ocfs2",
    "fs/smb",
    "fs/xfs",
    "net/rxrpc",
    "net/sctp",
    "net/tipc",
    "sound",
)
# Modules that are needed although their directory is left out: USB disks are SCSI disks.
KEPT_MODULES = ("drivers/scsi/scsi_common.ko", "drivers/scsi/scsi_mod.ko", "drivers/scsi/sd_mod.ko")
# What the initial RAM disk needs to find the root file system on any board: drivers of cards, disks and their buses.
INITRD_MODULES = (
    "crypto/crc32c_generic.ko",
    "drivers/block/virtio_blk.ko",
    "drivers/clk/bcm",
    "drivers/clk/clk-rp1.ko",
    "drivers/firmware/raspberrypi.ko",
    "drivers/gpio",
    "drivers/mfd/simple-mfd-i2c.ko",
    "drivers/misc/rp1",
    "drivers/mmc",
    "drivers/nvme/host",
    "drivers/pci/controller/pcie-brcmstb.ko",
    "drivers/pinctrl/bcm",
    "drivers/pinctrl/pinctrl-rp1.ko",
    "drivers/regulator/gpio-regulator.ko",
    "drivers/reset",
    "drivers/scsi/sd_mod.ko",
    "drivers/soc/bcm",
    "drivers/usb/dwc2",
    "drivers/usb/dwc3",
    "drivers/usb/host",
    "drivers/usb/storage",
    "drivers/virtio",
    "fs/ext4",
    "lib/crc/crc32c-cryptoapi.ko",
)


class KernelPackage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Debian package of a kernel, which names the current one as a dependency.

    Attributes:
        package: such as `linux-image-arm64`.
        suite: the suite that it is taken from.
    """

    package: str
    suite: str = SUITE


class ImageRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an image of one kind of board is made of.

    Attributes:
        title: the board, for people.
        kernels: kernel by page size.
        pages: page size of the kernel that is used by default.
        profile: name of the device profile that the board's configuration begins with; empty if there is none.
        raspberry_pi: whether the boot partition gets the firmware, config.txt and cmdline.txt of a Raspberry Pi, rather
            than a boot loader for UEFI and an extlinux.conf for U-Boot.
        firmware: files of the Raspberry Pi's firmware that the boot partition gets.
        device_trees: patterns of device trees for the boot partition, without suffix.
        radio_firmware: patterns of firmware files of the board's radios, relative to /usr/lib/firmware.
        command_line: the board's part of the kernel's command line: its consoles.
    """

    title: str
    kernels: dict[str, KernelPackage]
    pages: PageSize = "4k"
    profile: str = ""
    raspberry_pi: bool = False
    firmware: list[str] = []
    device_trees: list[str] = []
    radio_firmware: list[str] = []
    command_line: str = ""

    def kernel(self, pages: str | None) -> KernelPackage:
        """Return the kernel with this page size, or the default one. Raises InputError: the board has none."""
        kernel = self.kernels.get(pages or self.pages)
        if kernel is None:
            raise InputError(f"{self.title} has no kernel with {pages} pages; choose {' or '.join(self.kernels)}")
        return kernel


def recipe_names() -> list[str]:
    """Return the names of all recipes, as `--board` takes them."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def read_recipe(name: str) -> ImageRecipe:
    """Read the recipe of a board. Raises InputError: there is none of this name."""
    if name not in recipe_names():
        raise InputError(f"there is no image for {name!r}; the boards are {', '.join(recipe_names())}")
    return msgspec.toml.decode((RECIPES / f"{name}.toml").read_bytes(), type=ImageRecipe)
