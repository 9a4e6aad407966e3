"""Two network namespaces, `board` and `cloud`, and the relay between them.

    with Network() as network:
        network.become(steady(rtt=0.02))
        verifier = subprocess.Popen(network.command("cloud", ["cloud-verifier", "serve", ...]))
        network.pull()

Each namespace lives as long as a process in it that ends with ours, so nothing is left behind, however we end.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal

from tests.emulator.control import Controlled
from tests.emulator.relay import Become, Count, Counters, Forget
from tests.emulator.weather import Spell

Side = Literal["board", "cloud"]
ADDRESSES: dict[Side, str] = {"board": "10.99.0.1", "cloud": "10.99.0.2"}
DEVICE = Path("/dev/net/tun")
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
CLONE_NEWNET = 0x40000000
MTU = 1500


class Network:
    """The link and its two ends. Use as a context manager, in the main thread.

    Attributes:
        relay: the process between them.
    """

    relay: Controlled

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._stack = contextlib.ExitStack()
        self._holders: dict[Side, int] = {}

    def __enter__(self) -> Network:
        with self._stack as stack:
            devices = {side: self._end(side, index, stack) for index, side in enumerate(ADDRESSES)}
            command = [sys.executable, "-m", "tests.emulator.relay", *map(str, devices.values()), str(self._seed)]
            self.relay = Controlled(command, pass_fds=tuple(devices.values()))
            for device in devices.values():
                os.close(device)
            stack.callback(self.relay.stop)
            self.counters()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def command(self, side: Side, command: list[str]) -> list[str]:
        """`command`, to be run at that end; it is killed when the thread that started it ends."""
        path = f"/proc/{self._holders[side]}/ns/net"
        return ["nsenter", f"--net={path}", "setpriv", "--pdeathsig", "KILL", *command]

    @contextlib.contextmanager
    def inside(self, side: Side) -> Iterator[None]:
        """Sockets that this thread opens within belong to that end."""
        there_path = Path(f"/proc/{self._holders[side]}/ns/net")
        with Path("/proc/thread-self/ns/net").open() as here, there_path.open() as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(here.fileno())

    def become(self, *spells: Spell) -> None:
        """What the link is from now on: one spell, or several that repeat. Returns when it is so."""
        self._spells = list(spells)
        self.relay.order(Become(self._spells), Counters)

    def pull(self) -> None:
        """Pulls the cable: nothing passes any more, either way, and nobody is told."""
        self.relay.order(Become([Spell(plugged=False)]), Counters)

    def plug(self) -> None:
        """Puts it back: the link is what it was before."""
        self.relay.order(Become(self._spells), Counters)

    def forget(self) -> None:
        """Of all TCP connections of now, no packet passes any more; new ones work."""
        self.relay.order(Forget(), Counters)

    def counters(self) -> Counters:
        return self.relay.order(Count(), Counters)

    def _end(self, side: Side, index: int, stack: contextlib.ExitStack) -> int:
        """Makes a namespace with a device in it; the device's file."""
        # `cat` ends when our end of its pipe is closed, by us or by the kernel; it speaks once it is inside.
        holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        stack.callback(_close, holder)
        assert holder.stdin is not None and holder.stdout is not None
        with contextlib.suppress(OSError):
            holder.stdin.write(b"inside\n")
            holder.stdin.flush()
        if holder.stdout.readline() != b"inside\n":
            raise RuntimeError("cannot make a network namespace: this needs root, and CAP_SYS_ADMIN in a container")
        self._holders[side] = holder.pid
        name = f"fx{holder.pid}"
        device = _open_device(name)
        _run(f"ip link set dev {name} netns {holder.pid} name link{index}")
        _run(f"ip link set dev link{index} mtu {MTU} addrgenmode none", holder.pid)
        _run(f"ip address add {ADDRESSES[side]}/24 dev link{index}", holder.pid)
        _run("ip link set dev lo up", holder.pid)
        _run(f"ip link set dev link{index} up", holder.pid)
        return device


def lacking() -> str:
    """Why there can be no network here, in a few words; empty if there can."""
    for tool in ("ip", "unshare", "nsenter", "setpriv"):
        if shutil.which(tool) is None:
            return f"no {tool} here"
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    try:
        with Network():
            return ""
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        return f"no network namespaces with TUN devices here: {error}"


def _open_device(name: str) -> int:
    if not DEVICE.exists():
        DEVICE.parent.mkdir(exist_ok=True)
        os.mknod(DEVICE, stat.S_IFCHR | 0o600, os.makedev(10, 200))
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return device


def _run(command: str, namespace: int | None = None) -> None:
    words = command.split()
    if namespace is not None:
        words = ["nsenter", f"--net=/proc/{namespace}/ns/net", *words]
    subprocess.run(words, check=True, capture_output=True)


def _close(holder: subprocess.Popen[bytes]) -> None:
    holder.kill()
    holder.communicate()


def _enter(namespace: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.setns(namespace, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
