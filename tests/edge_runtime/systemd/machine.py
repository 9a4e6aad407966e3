"""A booted machine for tests: systemd in a container, with this machine's programs and network."""

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
# What systemd and the services read in /etc; the container has nothing else there.
ETC = (
    *("passwd", "group", "nsswitch.conf", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "login.defs", "alternatives"),
    *("dbus-1", "pam.d", "security", "ssl", "hosts"),
)
# Only a limit for hangs: booting takes a few seconds.
BOOT_TIMEOUT_SECONDS = 300.0
# Paths inside the container. On this machine they may be in a home directory, which services cannot see.
VENV, PYTHON, PACKAGES, SOURCE = "/opt/flexspec", "/opt/python", "/opt/packages", "/opt/source"


class Machine:
    """A booted container.

    Attributes:
        root: path of its file system on this machine; /usr is this machine's, read-only.
        python: path in the container of an interpreter with FlexSpec installed.
    """

    python = f"{VENV}/bin/python"

    def __init__(self, root: Path, leader: int, environment: dict[str, str]) -> None:
        self.root = root
        self._leader = leader
        self._environment = environment

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in the container, as root."""
        done = subprocess.run(
            ["nsenter", "--all", "--target", str(self._leader), *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **self._environment},
        )
        assert not check or done.returncode == 0, (command, done.returncode, done.stdout, done.stderr)
        return done

    def edge(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `edge-runtime` in the container."""
        return self.run(self.python, "-m", "edge_runtime.cli", *arguments, check=check)

    def cloud(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `cloud-verifier` in the container."""
        return self.run(self.python, "-m", "cloud_verifier.cli", *arguments, check=check)

    def unit_property(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", unit, f"--property={name}", "--value").stdout.strip()

    def journal(self, unit: str, *options: str) -> str:
        """Return the log of a unit."""
        return self.run("journalctl", "--no-pager", "--unit", unit, *options).stdout


@contextlib.contextmanager
def booted(directory: Path) -> Iterator[Machine]:
    """Boot a machine in `directory`; skip the test with a reason if that is impossible."""
    if os.geteuid() != 0:
        pytest.skip("booting a machine needs root")
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        pytest.skip(f"booting a machine needs {', '.join(missing)} (packages systemd-container and dbus)")
    root = directory / "root"
    binds, environment = _make_root(root)
    output = directory / "boot.log"
    command = [
        *("systemd-nspawn", "--boot", "--quiet", f"--directory={root}", f"--machine=flexspec-{os.getpid()}"),
        *("--register=no", "--keep-unit", "--link-journal=no", "--console=pipe"),
        *(f"--bind-ro={bind}" for bind in binds),
    ]
    with output.open("wb") as log:
        nspawn = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        machine = _wait_for_boot(nspawn, root, environment, output)
        yield machine
    finally:
        # systemd-nspawn shuts down on the first SIGTERM and terminates at once on the second.
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            nspawn.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                nspawn.wait(3)
                break
        # Its state directory holds a bundle, and pytest keeps temporary directories.
        shutil.rmtree(root, ignore_errors=True)


def _make_root(root: Path) -> tuple[list[str], dict[str, str]]:
    """Create a root file system. Returns the bind mounts, and the environment of all its processes."""
    for name in ("etc/systemd/system.conf.d", "usr/lib", "var", "tmp", "opt", "work", "proc", "sys", "dev", "root"):
        (root / name).mkdir(parents=True, exist_ok=True)
    binds = ["/usr"]
    for path in map(Path, ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")):
        if path.is_symlink():
            (root / path.name).symlink_to(path.readlink())
        elif path.is_dir():
            binds.append(str(path))
    for name in ETC:
        source, copy = Path("/etc", name), root / "etc" / name
        if source.is_dir():
            shutil.copytree(source, copy, symlinks=True, ignore_dangling_symlinks=True)
        elif source.exists():
            shutil.copy2(source, copy)
    # systemd-nspawn requires it before it mounts /usr.
    for copy in (root / "usr/lib/os-release", root / "etc/os-release"):
        shutil.copy("/usr/lib/os-release", copy)
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
    environment = {"LD_LIBRARY_PATH": str(base / "lib"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    manager = "".join(f'DefaultEnvironment="{name}={value}"\n' for name, value in environment.items())
    (root / "etc/systemd/system.conf.d/test.conf").write_text(f"[Manager]\n{manager}")
    return binds, environment


def _wait_for_boot(nspawn: subprocess.Popen[bytes], root: Path, environment: dict[str, str], output: Path) -> Machine:
    """Wait until systemd has started everything. Skips the test if it does not."""
    children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children")
    deadline, state = time.monotonic() + BOOT_TIMEOUT_SECONDS, "no state"
    while time.monotonic() < deadline and nspawn.poll() is None:
        with contextlib.suppress(OSError, AssertionError, subprocess.TimeoutExpired):
            if leader := children.read_text().split():
                machine = Machine(root, int(leader[0]), environment)
                state = machine.run("systemctl", "is-system-running", check=False).stdout.strip()
                # Degraded: a unit of the container failed, such as one that needs a feature this kernel lacks.
                if state in ("running", "degraded"):
                    return machine
        time.sleep(0.2)
    pytest.skip(f"no container boots here: {state}; {output.read_text(errors='replace')[-500:]}")
