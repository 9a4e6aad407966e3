"""An image like a stock Raspberry Pi OS, for emulated boards: Debian with cloud-init, sudo and venv, without FlexSpec.

Raspberry Pi OS itself is not ours to download in a test. This has the same Debian release, Python, cloud-init with its
files on the boot partition, NetworkManager and OpenSSH; it does not have the Raspberry Pi's kernel and tools. The
packages that our images lack are unpacked over their base, and their units enabled, without maintainer scripts.
"""

from __future__ import annotations

import configparser
import tempfile
from collections.abc import Callable
from pathlib import Path

from device_profiles.image import disk
from device_profiles.image.archives import new_archive
from device_profiles.image.base_root import BASE_EPOCH, build_base
from device_profiles.image.boot_files import boot_directory
from device_profiles.image.kernel import build_initrd, unpack, unpack_kernel
from device_profiles.image.packages import Mirrors, PackageArchive
from device_profiles.image.programs import run
from device_profiles.image.recipe import PACKAGES, read_recipe
from device_profiles.image.system_files import SSH_KEYS_UNIT

EXTRA_PACKAGES = ("cloud-init", "python3-venv", "sudo")
BOOT_BYTES = 320 * disk.MIB
# As Raspberry Pi OS configures it: its files are on the boot partition.
CLOUD_INIT = """\
datasource_list: [NoCloud, None]
datasource:
  NoCloud:
    seedfrom: file:///boot/firmware/
system_info:
  network:
    renderers: [network-manager]
ssh_genkeytypes: [ed25519]
"""
FSTAB = f"LABEL={disk.ROOT_LABEL} / ext4 noatime 0 1\nLABEL={disk.BOOT_LABEL} /boot/firmware vfat defaults 0 2\n"
# Interfaces have the kernel's names, eth0, as on a Raspberry Pi.
COMMAND_LINE = "net.ifnames=0"


def build_stock_image(image: Path, cache: Path, say: Callable[[str], None]) -> None:
    """Write the image. Raises ImageError: a program is missing or failed."""
    archive = PackageArchive(cache / "apt", Mirrors())
    archive.update()
    base, base_files = build_base(archive, PACKAGES, Mirrors(), cache, say)
    present = {file.package for file in base_files}
    resolved = archive.resolve(["?essential", "apt", *PACKAGES, *EXTRA_PACKAGES])
    recipe = read_recipe("generic-arm64")
    with tempfile.TemporaryDirectory(prefix=".stock-image-", dir=image.parent.resolve()) as name:
        scratch = Path(name)
        say("stock image: unpacking packages")
        unpack(archive, [file for file in resolved if file.package not in present], scratch / "extra")
        for link, target in unit_links(scratch / "extra"):
            path = scratch / "extra/etc/systemd/system" / link
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(target)
        owner = ["--owner=0", "--group=0", f"--mtime=@{BASE_EPOCH}"]
        run(["tar", "--create", "--file", scratch / "extra.tar", *owner, "--directory", scratch / "extra", "."])
        kernel, _ = unpack_kernel(archive, recipe.kernel(None), scratch / "kernel")
        unpack(
            archive, [archive.newest("busybox-static"), archive.newest("systemd-boot-efi")], scratch / "boot-packages"
        )
        initrd = build_initrd(kernel, scratch / "boot-packages/usr/bin/busybox", scratch)
        _boot_partition(kernel, initrd, scratch)
        with new_archive(scratch / "system.tar", BASE_EPOCH) as system:
            system.file("etc/cloud/cloud.cfg.d/99_raspberry-pi.cfg", CLOUD_INIT)
            drop_in = "[Unit]\nRequiresMountsFor=/boot/firmware\n"
            system.file("etc/systemd/system/cloud-init-local.service.d/boot.conf", drop_in)
            system.file("etc/systemd/system/flexspec-ssh-keys.service", SSH_KEYS_UNIT)
            wants = "etc/systemd/system/ssh.service.wants/flexspec-ssh-keys.service"
            system.link(wants, "/etc/systemd/system/flexspec-ssh-keys.service")
            # Debian's alternatives make this link; cloud-init's units speak through it.
            system.link("usr/bin/nc", "nc.openbsd")
            system.file("etc/fstab", FSTAB)
            system.file("etc/hostname", "raspberrypi\n")
            system.file("etc/hosts", "127.0.0.1\tlocalhost\n127.0.1.1\traspberrypi\n")
            system.file("etc/machine-id", "")
            system.directory("boot/firmware")
            system.tree(kernel.modules, f"usr/lib/modules/{kernel.release}")
        say("stock image: file systems")
        boot, root = scratch / "boot.img", scratch / "root.img"
        disk.make_boot_file_system(boot, scratch / "boot", BOOT_BYTES, BASE_EPOCH)
        archives = [base, scratch / "extra.tar", scratch / "system.tar"]
        disk.make_root_file_system(root, archives, scratch, BASE_EPOCH)
        # Room for what is installed; Raspberry Pi OS grows its root by itself.
        with root.open("r+b") as file:
            file.truncate(root.stat().st_size + (1 << 30))
        run(["resize2fs", root])
        disk.assemble(image, boot, root, BASE_EPOCH)


def unit_links(root: Path) -> list[tuple[str, str]]:
    """Return link and target, below /etc/systemd/system, that enable the units of the packages unpacked at `root`."""
    links = []
    for path in sorted((root / "usr/lib/systemd/system").glob("cloud-*")):
        unit = configparser.ConfigParser(strict=False, interpolation=None)
        unit.optionxform = str  # type: ignore[assignment,method-assign]
        if path.is_file() and path.suffix in (".service", ".target", ".socket"):
            unit.read(path)
            wanted_by = unit.get("Install", "WantedBy", fallback="").split()
            links += [(f"{name}.wants/{path.name}", f"/usr/lib/systemd/system/{path.name}") for name in wanted_by]
    return links


def _boot_partition(kernel: object, initrd: bytes, scratch: Path) -> None:
    recipe = read_recipe("generic-arm64")
    boot_directory(recipe, kernel, initrd, scratch / "boot-packages", scratch / "boot")  # type: ignore[arg-type]
    boot = scratch / "boot"
    (boot / "flexspec.toml").unlink()
    loader = boot / "extlinux/extlinux.conf"
    loader.write_text(loader.read_text().replace("append ", f"append {COMMAND_LINE} "))
    for name, text in {
        "config.txt": "arm_64bit=1\n",
        "cmdline.txt": f"{COMMAND_LINE}\n",
        "user-data": "#cloud-config\n",
        "meta-data": "instance-id: stock\n",
        "network-config": "network:\n  version: 2\n",
    }.items():
        (boot / name).write_text(text)
