"""A machine with an init of its own: systemd in a container, over this machine's programs and its network."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[3]
PROGRAMS = ("systemd-nspawn", "nsenter", "systemctl", "dbus-daemon")
# What init and its services read of /etc; the rest is made anew.
ETC = (
    *("passwd", "group", "nsswitch.conf", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "login.defs", "alternatives"),
    *("dbus-1", "pam.d", "security", "ssl", "hosts"),
)
BOOT_SECONDS = 90.0
# Where the container finds what may lie in a home here, which no service can see.
VENV, PYTHON, PACKAGES, SOURCE = "/opt/flexspec", "/opt/python", "/opt/packages", "/opt/source"


class Machine:
    """A booted container.

    Attributes:
        root: its file system, from here; /usr is this machine's, read-only.
        python: an interpreter in it that knows FlexSpec.
    """

    python = f"{VENV}/bin/python"

    def __init__(self, root: Path, leader: int, environment: dict[str, str]) -> None:
        self.root = root
        self._leader = leader
        self._environment = environment

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a command in it, as root."""
        done = subprocess.run(
            ["nsenter", "--all", "--target", str(self._leader), *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **self._environment},
        )
        assert not check or done.returncode == 0, (command, done.returncode, done.stdout, done.stderr)
        return done

    def edge(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs `edge-runtime` in it."""
        return self.run(self.python, "-m", "edge_runtime.cli", *arguments, check=check)

    def cloud(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs `cloud-verifier` in it."""
        return self.run(self.python, "-m", "cloud_verifier.cli", *arguments, check=check)

    def shown(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", unit, f"--property={name}", "--value").stdout.strip()

    def journal(self, unit: str, *options: str) -> str:
        """What a unit has logged."""
        return self.run("journalctl", "--no-pager", "--unit", unit, *options).stdout


@contextlib.contextmanager
def booted(directory: Path) -> Iterator[Machine]:
    """Boots a machine in `directory`; skips the test, with a word, where that cannot be."""
    if os.geteuid() != 0:
        pytest.skip("booting a machine needs root")
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        pytest.skip(f"booting a machine needs {', '.join(missing)} (packages systemd-container and dbus)")
    root = directory / "root"
    binds, environment = _furnish(root)
    output = directory / "boot.log"
    command = [
        *("systemd-nspawn", "--boot", "--quiet", f"--directory={root}", f"--machine=flexspec-{os.getpid()}"),
        *("--register=no", "--keep-unit", "--link-journal=no", "--console=pipe"),
        *(f"--bind-ro={bind}" for bind in binds),
    ]
    with output.open("wb") as log:
        nspawn = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        machine = _wait(nspawn, root, environment, output)
        yield machine
    finally:
        # Twice means at once.
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            nspawn.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                nspawn.wait(3)
                break
        # Its state directory holds a bundle, and pytest keeps what it is not told to remove.
        shutil.rmtree(root, ignore_errors=True)


def _furnish(root: Path) -> tuple[list[str], dict[str, str]]:
    """Makes a root file system. Returns what is bound into it, and the environment of everything in it."""
    for name in ("etc/systemd/system.conf.d", "usr/lib", "var", "tmp", "opt", "work", "proc", "sys", "dev", "root"):
        (root / name).mkdir(parents=True, exist_ok=True)
    binds = ["/usr"]
    for path in map(Path, ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")):
        if path.is_symlink():
            (root / path.name).symlink_to(path.readlink())
        elif path.is_dir():
            binds.append(str(path))
    for name in ETC:
        source, place = Path("/etc", name), root / "etc" / name
        if source.is_dir():
            shutil.copytree(source, place, symlinks=True, ignore_dangling_symlinks=True)
        elif source.exists():
            shutil.copy2(source, place)
    # nspawn looks for it before it binds /usr.
    for place in (root / "usr/lib/os-release", root / "etc/os-release"):
        shutil.copy("/usr/lib/os-release", place)
    (root / "etc/machine-id").touch()

    base = Path(sys.base_prefix)
    if not base.is_relative_to("/usr"):
        binds.append(f"{base}:{PYTHON}")
        base = Path(PYTHON)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = Path(sys.prefix, "lib", version, "site-packages")
    binds += [f"{site}:{PACKAGES}", f"{CHECKOUT}:{SOURCE}"]
    venv = root / VENV[1:]
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").symlink_to(base / "bin" / version)
    (venv / "pyvenv.cfg").write_text(f"home = {base / 'bin'}\n")
    packages = venv / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (packages / "paths.pth").write_text(f"{SOURCE}\n{PACKAGES}\n")
    environment = {"LD_LIBRARY_PATH": str(base / "lib"), "PYTHONDONTWRITEBYTECODE": "1"}
    manager = "".join(f'DefaultEnvironment="{name}={value}"\n' for name, value in environment.items())
    (root / "etc/systemd/system.conf.d/test.conf").write_text(f"[Manager]\n{manager}")
    return binds, environment


def _wait(nspawn: subprocess.Popen[bytes], root: Path, environment: dict[str, str], output: Path) -> Machine:
    """Until init has started everything. Skips the test where it does not."""
    children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children")
    until, state = time.monotonic() + BOOT_SECONDS, "nothing yet"
    while time.monotonic() < until and nspawn.poll() is None:
        with contextlib.suppress(OSError, AssertionError, subprocess.TimeoutExpired):
            if leader := children.read_text().split():
                machine = Machine(root, int(leader[0]), environment)
                state = machine.run("systemctl", "is-system-running", check=False).stdout.strip()
                # Degraded: something that this kernel lacks, and nothing of ours.
                if state in ("running", "degraded"):
                    return machine
        time.sleep(0.2)
    pytest.skip(f"no machine boots here: {state}; {output.read_text(errors='replace')[-500:]}")
