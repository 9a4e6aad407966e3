"""Two network namespaces, `board` and `cloud`, and the relay between them.

    with Network() as network:
        network.set_conditions(steady_conditions(rtt=0.02))
        verifier = subprocess.Popen(network.command("cloud", ["cloud-verifier", "serve", ...]))
        network.unplug()

Each namespace lives as long as a holder process in it, which ends with this process, so nothing is left over even after
a crash.
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

from tests.emulator.control import ControlledProcess
from tests.emulator.link_conditions import LinkConditions
from tests.emulator.relay import Counters, ForgetConnections, GetCounters, SetConditions

Side = Literal["board", "cloud"]
ADDRESSES: dict[Side, str] = {"board": "10.99.0.1", "cloud": "10.99.0.2"}
DEVICE = Path("/dev/net/tun")
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
CLONE_NEWNET = 0x40000000
MTU = 1500


class Network:
    """The link and its two ends. Use it as a context manager, in the main thread.

    Attributes:
        relay: the process that forwards packets between the ends.
    """

    relay: ControlledProcess

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._stack = contextlib.ExitStack()
        self._holders: dict[Side, int] = {}

    def __enter__(self) -> Network:
        with self._stack as stack:
            devices = {side: self._create_end(side, index, stack) for index, side in enumerate(ADDRESSES)}
            command = [sys.executable, "-m", "tests.emulator.relay", *map(str, devices.values()), str(self._seed)]
            self.relay = ControlledProcess(command, pass_fds=tuple(devices.values()))
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
        """Wrap `command` so that it runs at one end and is killed when the thread that started it ends."""
        path = f"/proc/{self._holders[side]}/ns/net"
        return ["nsenter", f"--net={path}", "setpriv", "--pdeathsig", "KILL", *command]

    @contextlib.contextmanager
    def inside(self, side: Side) -> Iterator[None]:
        """Context manager: sockets that this thread opens inside it belong to that end."""
        there_path = Path(f"/proc/{self._holders[side]}/ns/net")
        with Path("/proc/thread-self/ns/net").open() as here, there_path.open() as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(here.fileno())

    def set_conditions(self, *conditions: LinkConditions) -> None:
        """Set the conditions of the link: one set, or several that repeat in turn. Returns once they apply."""
        self._conditions = list(conditions)
        self.relay.send(SetConditions(self._conditions), Counters)

    def unplug(self) -> None:
        """Unplug the cable: drop all packets in both directions without notifying either end."""
        self.relay.send(SetConditions([LinkConditions(plugged=False)]), Counters)

    def replug(self) -> None:
        """Undo `unplug`: restore the previous conditions."""
        self.relay.send(SetConditions(self._conditions), Counters)

    def forget_connections(self) -> None:
        """Drop all packets of the current TCP connections from now on; new connections work."""
        self.relay.send(ForgetConnections(), Counters)

    def counters(self) -> Counters:
        return self.relay.send(GetCounters(), Counters)

    def _create_end(self, side: Side, index: int, stack: contextlib.ExitStack) -> int:
        """Create a namespace with a TUN device in it, and return the device's file descriptor."""
        # `cat` ends when our end of its pipe is closed, by us or by the kernel. Its echo shows that it is in the
        # namespace.
        holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        stack.callback(_close, holder)
        assert holder.stdin is not None and holder.stdout is not None
        with contextlib.suppress(OSError):
            holder.stdin.write(b"inside\n")
            holder.stdin.flush()
        if holder.stdout.readline() != b"inside\n":
            raise RuntimeError("cannot create a network namespace: this needs root, and CAP_SYS_ADMIN in a container")
        self._holders[side] = holder.pid
        name = f"fx{holder.pid}"
        device = _open_device(name)
        _run(f"ip link set dev {name} netns {holder.pid} name link{index}")
        _run(f"ip link set dev link{index} mtu {MTU} addrgenmode none", holder.pid)
        _run(f"ip address add {ADDRESSES[side]}/24 dev link{index}", holder.pid)
        _run("ip link set dev lo up", holder.pid)
        _run(f"ip link set dev link{index} up", holder.pid)
        return device


def missing_requirement() -> str:
    """Return why this machine cannot run the emulator, or an empty string if it can."""
    for tool in ("ip", "unshare", "nsenter", "setpriv"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    if os.geteuid() != 0:
        return "creating network namespaces needs root"
    try:
        with Network():
            return ""
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        return f"cannot create network namespaces with TUN devices: {error}"


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
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
