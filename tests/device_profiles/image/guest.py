"""An emulated board: an image booted by qemu-system-aarch64, with ports for SSH and its service on this machine."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import psutil

from device_profiles.flash.fleet import personalise
from device_profiles.image.block_map import read_block_map
from device_profiles.image.boot_partition import ImagePartition
from device_profiles.image.programs import ImageError, require, run

# Of this machine: for the emulator, and for the image like a stock system.
PROGRAMS = ("qemu-system-aarch64", "ssh", "ssh-keygen", "resize2fs")
# qemu's network: this machine, as the guest sees it.
HOST_ADDRESS = "10.0.2.2"
# Such a network, in which this machine has the address of the README's verifier.
README_NETWORK = "net=192.168.1.0/24,host=192.168.1.20"
# The card is larger than the image, so that the board has something to grow into.
EXTRA_BYTES = 512 << 20
# Only limits for hangs, on a machine that emulates and is busy with other things.
BOOT_SECONDS, COMMAND_SECONDS = 7200.0, 7200.0
# Likewise, for the guest's own waiting for devices and units.
PATIENCE = " ".join(
    f"{option}=7200"
    for option in ("systemd.default_device_timeout_sec", "systemd.default_timeout_start_sec", "udev.event_timeout")
)


class RealBoard(NamedTuple):
    """How fast a board is that nobody has measured yet, to say what a counted boot would take there.

    Attributes:
        title: its name.
        mips: million instructions a second of one core.
        card_mb_per_second: of its card reader.
    """

    title: str
    mips: int
    card_mb_per_second: int


class BoardModel(NamedTuple):
    """A kind of board to emulate.

    Attributes:
        cpu: of qemu.
        memory_mb: of the machine.
        board: the board that it stands for.
        arguments: more of the kernel's command line.
    """

    cpu: str
    memory_mb: int
    board: RealBoard
    arguments: str = ""


# A Raspberry Pi Zero 2 W; a Raspberry Pi 5 with the command line of Raspberry Pi OS, which turns memory cgroups off.
# Clocks are published: 1.0 and 2.4 GHz. Instructions per cycle are assumed: 0.5 of two for the in-order Cortex-A53, and
# 1.2 of four for the Cortex-A76, as interpreters and cold caches leave. So are the cards: four bits at 50 MHz carry at
# most 25 MB/s, SDR104 at most 104 MB/s.
SMALL_BOARD = BoardModel("cortex-a53", 512, RealBoard("Raspberry Pi Zero 2 W", 500, 20))
LARGE_BOARD = BoardModel("cortex-a76", 1024, RealBoard("Raspberry Pi 5", 2900, 80), "cgroup_disable=memory")


class Guest:
    """A card in an emulated board.

    Attributes:
        card: the card: a copy of an image.
        url: of its service, on this machine.
        log: what its serial console printed, of all boots.
        model: the kind of board.
        counts_instructions: whether its clock counts instructions.
    """

    def __init__(
        self,
        card: Path,
        key: Path,
        model: BoardModel,
        *,
        user: str = "root",
        network: str = "",
        counts_instructions: bool = False,
    ) -> None:
        """
        Args:
            key: private key with which `user` may log in.
            network: options of qemu's user network; empty for its own addresses.
            counts_instructions: the guest's clock counts instructions, a nanosecond each, of all its processors
                together, and goes on while they are idle: its times do not depend on how busy this machine is.
        """
        self.counts_instructions = counts_instructions
        self.card, self.log, self._key, self.model = card, card.with_suffix(".log"), key, model
        self._user, self._network = user, network
        self._service_port, self._ssh_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self._service_port}"

    @property
    def lacks_memory_cgroups(self) -> bool:
        """Whether the kernel does not account for the memory of services."""
        return "cgroup_disable=memory" in self.model.arguments

    @contextlib.contextmanager
    def booted(self) -> Iterator[None]:
        """Boot, and shut down cleanly in the end."""
        require(*PROGRAMS)
        boot = ImagePartition(self.card)
        for name in ("vmlinuz", "initrd.img"):
            self.card.with_name(name).write_bytes(boot.read(name) or b"")
        loader = (boot.read("extlinux/extlinux.conf") or b"").decode()
        append = next(line.split(maxsplit=1)[1] for line in loader.splitlines() if line.split()[0] == "append")
        ports = f"hostfwd=tcp:127.0.0.1:{self._service_port}-:8400,hostfwd=tcp:127.0.0.1:{self._ssh_port}-:22"
        command = ["qemu-system-aarch64", "-M", "virt", "-cpu", self.model.cpu, "-m", str(self.model.memory_mb)]
        command += ["-icount", "shift=0"] if self.counts_instructions else []
        command += ["-smp", "2", "-display", "none", "-no-reboot", "-serial", "stdio", "-monitor", "none"]
        command += ["-kernel", str(self.card.with_name("vmlinuz")), "-initrd", str(self.card.with_name("initrd.img"))]
        command += ["-append", f"{append} {self.model.arguments} {PATIENCE}".replace("console=tty1", "")]
        command += ["-drive", f"file={self.card},if=none,id=card,format=raw", "-device", "virtio-blk-pci,drive=card"]
        network = ",".join(filter(None, ["user", "id=net", self._network, ports]))
        command += ["-netdev", network, "-device", "virtio-net-pci,netdev=net,romfile="]
        command += ["-device", "virtio-rng-pci"]
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._emulator = psutil.Process(process.pid)
        try:
            yield
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                self.run(*([] if self._user == "root" else ["sudo"]), "systemctl", "poweroff")
            process.wait(COMMAND_SECONDS)
        finally:
            process.kill()
            process.wait()

    def processor_seconds(self) -> float:
        """Return the processor time that the emulator has used since the boot: unlike uptime, not a matter of load."""
        times = self._emulator.cpu_times()
        return times.user + times.system

    def copy(self, path: Path, name: str) -> None:
        """Copy a file of this machine into the guest, as `name`."""
        with path.open("rb") as content:
            self.run(f"cat >{shlex.quote(name)}", content=content)

    def run(self, *command: str, check: bool = True, content: IO[bytes] | None = None) -> str:
        """Run a command in the guest, with this standard input. Returns its output and errors."""
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "ConnectTimeout=30"]
        ssh = ["ssh", "-i", str(self._key), "-p", str(self._ssh_port), *(word for o in options for word in ("-o", o))]
        done = subprocess.run(
            [*ssh, f"{self._user}@127.0.0.1", *command],
            stdin=content or subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_SECONDS,
        )
        assert not check or done.returncode == 0, (command, done.returncode, done.stdout)
        return done.stdout.strip()

    def wait_for(self, what: str, condition: Callable[[], object]) -> None:
        """Wait until `condition` returns something true; errors count as not yet."""
        deadline = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                if condition():
                    return
            time.sleep(1)
        raise AssertionError(f"not within {BOOT_SECONDS:g} s: {what}; the serial console is in {self.log}")

    def property(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", unit, f"--property={name}", "--value")


def make_card(
    image: Path, configuration: str, directory: Path, model: BoardModel, *, counts_instructions: bool = False
) -> Guest:
    """Put an image with this flexspec.toml on a card. A key for SSH is made, and added to the configuration."""
    key = make_key(directory)
    text = f'{configuration}\n[ssh]\nkeys = ["{key.with_suffix(".pub").read_text().strip()}"]\n'
    card = directory / "card.img"
    personalise(image, read_block_map(image.with_name(f"{image.name}.bmap")), text, card)
    with card.open("r+b") as file:
        file.truncate(card.stat().st_size + EXTRA_BYTES)
    return Guest(card, key, model, counts_instructions=counts_instructions)


def make_key(directory: Path) -> Path:
    """Make a key for SSH. Returns the private one; the public one is beside it, with the suffix .pub."""
    key = directory / "key"
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key])
    return key


def keep_log(guest: Guest, place: Path) -> None:
    """Copy the serial console's log."""
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(guest.log, place)


def free_port() -> int:
    """Return a port that no one listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    # `make boot-test` asks this first: building an image takes half an hour.
    try:
        require(*PROGRAMS)
    except ImageError as error:
        raise SystemExit(str(error)) from None
