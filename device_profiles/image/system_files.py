"""The configuration of an image's root file system: everything that is neither a Debian package nor the runtime."""

from __future__ import annotations

from pathlib import Path

from device_profiles.first_boot.board_file import FILE_NAME
from device_profiles.image.archives import TreeArchive
from device_profiles.image.disk import BOOT_LABEL, ROOT_LABEL
from device_profiles.image.packages import Mirrors
from device_profiles.image.recipe import ImageRecipe
from device_profiles.image.runtime import HOME
from edge_runtime.systemd.actions import BOARD_UNIT
from edge_runtime.systemd.units import render_unit

BOOT_DIRECTORY = "/boot/firmware"
CONFIGURE_UNIT = f"""\
# Applies {BOOT_DIRECTORY}/{FILE_NAME} before the network and the service start; see `device-profile configure --help`.
[Unit]
Description=Apply {FILE_NAME} of the boot partition
DefaultDependencies=no
After=local-fs.target systemd-sysusers.service systemd-udevd.service
Before=NetworkManager.service ssh.service {BOARD_UNIT.name}.service network-pre.target sysinit.target
RequiresMountsFor={BOOT_DIRECTORY} /var
ConditionPathIsSymbolicLink={HOME}

[Service]
Type=oneshot
RemainAfterExit=yes
# The board lost power while an update was on trial: return to the version before it (edge_runtime/updates/slots.py).
# By the shell, since the update may be what does not run.
ExecStartPre=-/bin/sh -c 'slot=$$(cat {HOME}.update 2>/dev/null) && test -d /opt/$$slot/bin && \
    ln -sfn $$slot {HOME}.new && mv -T {HOME}.new {HOME}'
ExecStart={HOME}/bin/device-profile configure --grow
StandardOutput=journal+console
StandardError=journal+console
# Growing a large card's file system, and testing a new draft, on a slow board.
TimeoutStartSec=10min

[Install]
WantedBy=sysinit.target
"""
# A secret of each board: the image has none.
SSH_KEYS_UNIT = """\
[Unit]
Description=Make the SSH host keys of this board
Before=ssh.service
ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/ssh-keygen -q -t ed25519 -N "" -f /etc/ssh/ssh_host_ed25519_key

[Install]
WantedBy=ssh.service
"""
SSH_CONFIGURATION = """\
# The only one that is made: a key for RSA takes a small board many seconds.
HostKey /etc/ssh/ssh_host_ed25519_key
# Nobody has a password. The keys of [ssh] in flexspec.toml may log in as root.
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
"""
# SD cards wear out: bounded, and written every five minutes (systemd's default), at once for what is critical.
JOURNAL = "[Journal]\nStorage=persistent\nSystemMaxUse=48M\nRuntimeMaxUse=16M\n"
# Compressed memory instead of a swap file on the card.
ZRAM = "[zram0]\nzram-size = ram / 2\ncompression-algorithm = zstd\n"
# A hardware watchdog restarts a board that hangs. systemd ignores it on boards without one.
WATCHDOG = "[Manager]\nRuntimeWatchdogSec=15s\n"
# The kernel's name of a network interface is the one that people find in documentation.
ENABLED = {
    "sysinit.target.wants": ("flexspec-configure.service",),
    "multi-user.target.wants": ("flexspec-edge.service", "NetworkManager.service", "ssh.service"),
    "ssh.service.wants": ("flexspec-ssh-keys.service",),
}
# wpa_supplicant only where there is a radio.
RADIO = "[Unit]\nConditionDirectoryNotEmpty=/sys/class/ieee80211\n"
# systemd compares its time with that of /usr: what follows from /usr, such as the cache of ldconfig, is made with the
# packages, and not once more at the first boot.
UPDATED = "# Time of the last update of /usr; see systemd-update-done.service(8).\n"
# Units of Debian that write to the card, take time or wait, for nothing that a board needs.
MASKED = (
    "NetworkManager-wait-online.service",
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dev-hugepages.mount",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "man-db.timer",
    "modprobe@drm.service",
    "modprobe@efi_pstore.service",
    "modprobe@fuse.service",
    "proc-sys-fs-binfmt_misc.automount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-tracing.mount",
    "systemd-binfmt.service",
    "systemd-pstore.service",
)
OWN_UNITS = ("flexspec-configure.service", "flexspec-edge.service", "flexspec-ssh-keys.service")


def add_system_files(
    archive: TreeArchive, board: str, recipe: ImageRecipe, version: str, bundle_store: Path | None
) -> None:
    """Add the configuration of an image to the archive of its root file system.

    Args:
        board: name of the recipe.
        version: FlexSpec's.
        bundle_store: a bundle store to put on the board; None for none.
    """
    units = "etc/systemd/system"
    service = render_unit(BOARD_UNIT, BOARD_UNIT.name, Path(HOME, "bin/python"), [])
    for name, text in zip(OWN_UNITS, (CONFIGURE_UNIT, service, SSH_KEYS_UNIT), strict=True):
        archive.file(f"{units}/{name}", text)
    for target, names in ENABLED.items():
        for name in names:
            place = f"/{units}" if name in OWN_UNITS else "/usr/lib/systemd/system"
            archive.link(f"{units}/{target}/{name}", f"{place}/{name}")
    for name in MASKED:
        archive.link(f"{units}/{name}", "/dev/null")
    archive.file("etc/ssh/sshd_config.d/flexspec.conf", SSH_CONFIGURATION)
    archive.file("etc/systemd/journald.conf.d/flexspec.conf", JOURNAL)
    archive.file("etc/systemd/zram-generator.conf", ZRAM)
    archive.file("etc/systemd/system.conf.d/flexspec.conf", WATCHDOG)
    archive.file("etc/systemd/system/wpa_supplicant.service.d/flexspec.conf", RADIO)
    archive.file("etc/.updated", UPDATED)
    archive.file("var/.updated", UPDATED)
    archive.file("etc/fstab", _fstab())
    archive.file("etc/hostname", "flexspec\n")
    archive.file("etc/hosts", "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\tflexspec\n")
    archive.file("etc/apt/sources.list", "\n".join(Mirrors().sources()) + "\n")
    # Empty: systemd makes the machine's own at the first boot.
    archive.file("etc/machine-id", "")
    archive.file("etc/flexspec-release", f"board={board}\ntitle={recipe.title}\nversion={version}\n")
    # systemd takes its time stamp as the earliest time that the clock can have: a Raspberry Pi has no clock of its own.
    archive.file("usr/lib/clock-epoch", "")
    archive.directory("boot/firmware")
    archive.directory("etc/credstore", 0o700)
    profile = f'[planner]\nprofile = "{recipe.profile}"\n' if recipe.profile else ""
    archive.file("etc/flexspec/config.toml", f"# Replaced by {FILE_NAME} of the boot partition.\n{profile}")
    if bundle_store:
        archive.tree(bundle_store, "var/lib/flexspec/bundles")


def make_bundle_store(bundle: Path, scratch: Path) -> Path:
    """Return a new store with this bundle, a directory or an archive, which is tested on this machine."""
    from edge_runtime.bundles.store import LOCK, BundleStore

    store = scratch / "bundles"
    BundleStore(store).install(bundle)
    (store / LOCK).unlink()
    return store


def _fstab() -> str:
    return (
        f"LABEL={ROOT_LABEL} / ext4 noatime,errors=remount-ro 0 1\n"
        # Only root reads it: secrets are in it until the first boot. A board whose boot partition is damaged or slow
        # starts with the configuration that it has, rather than in an emergency shell that nobody sees.
        f"LABEL={BOOT_LABEL} {BOOT_DIRECTORY} vfat noatime,umask=0077,nofail,x-systemd.device-timeout=5min 0 2\n"
        "tmpfs /tmp tmpfs nosuid,nodev,size=25% 0 0\n"
    )
