"""The runtime as it is installed on a board: a virtual environment with aarch64 wheels, made without running arm64 pip.

The wheels are pinned by hash in `wheels.lock`. `python -m device_profiles.image.runtime` writes that file anew from the
dependencies in pyproject.toml and the versions in constraints.txt.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from device_profiles.image.archives import TreeArchive, new_archive
from device_profiles.image.programs import ImageError, run

CHECKOUT = Path(__file__).parents[2]
LOCK = Path(__file__).with_name("wheels.lock")
# Where the runtime is on a board. `edge-runtime update` switches this link between two directories.
HOME, FIRST_SLOT = "/opt/flexspec", "/opt/flexspec.a"
# Debian 13's Python.
PYTHON_VERSION = "3.13"
# Debian 13 has glibc 2.41; pip does not conclude from it that wheels for older ones work, too.
PLATFORMS = (*(f"manylinux_2_{minor}_aarch64" for minor in range(41, 16, -1)), "manylinux2014_aarch64")
TARGET = (
    *(word for platform in PLATFORMS for word in ("--platform", platform)),
    *("--python-version", PYTHON_VERSION, "--only-binary=:all:", "--ignore-requires-python"),
)
# Dependencies that a package declares, but imports only in functions that the board does not call: tokenizers imports
# huggingface_hub in from_pretrained. It brings eleven packages, of 20 MB.
NEVER_IMPORTED = {"tokenizers": {"huggingface-hub"}}
# What the board never imports inside of packages, relative to site-packages.
LEFT_OUT = (
    # httpx's own command line, which `import httpx` imports where it exists, and rich and pygments with it.
    "httpx/_main.py",
    "numpy/**/tests",
    "numpy/_core/include",
    "numpy/_core/lib",
    "numpy/f2py",
    "onnxruntime/datasets",
    "onnxruntime/quantization",
    "onnxruntime/tools",
    "onnxruntime/transformers",
    "**/*.pyi",
    "bin",
)
COMMANDS = {"edge-runtime": "edge_runtime.cli.main", "device-profile": "device_profiles.cli"}
SCRIPT = """#!{home}/bin/python
import sys

from {module} import main

sys.exit(main())
"""


def build_wheel(directory: Path, epoch: int) -> Path:
    """Build FlexSpec's own wheel from this checkout. Raises ImageError: this is not a checkout."""
    if not (CHECKOUT / "pyproject.toml").is_file():
        raise ImageError("this installation has no sources to build a wheel from; name one with --wheel FILE")
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch)}
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    pip += ["--wheel-dir", str(directory), str(CHECKOUT)]
    run(pip, env=environment)
    return next(directory.glob("flexspec-*.whl"))


def build_runtime(
    wheel: Path, target: Path, *, epoch: int, compiler: Sequence[str], lock: Path = LOCK, say: Callable[[str], None]
) -> None:
    """Write the tar archive `target` of the runtime: `FIRST_SLOT`, and the link `HOME` to it.

    Args:
        wheel: FlexSpec's own.
        epoch: time stamp of all files.
        compiler: command of a Python of PYTHON_VERSION, which compiles the modules to byte code: the service cannot
            write that itself. Empty: without byte code.
        lock: requirements with versions and hashes.

    Raises:
        ImageError: a wheel cannot be downloaded, or does not have its hash.
    """
    with tempfile.TemporaryDirectory(prefix="flexspec-runtime-") as scratch:
        packages = Path(scratch, "site-packages")
        say("runtime: installing the wheels of wheels.lock")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        pip += ["--target", str(packages)]
        run([*pip, *TARGET, "--require-hashes", "--requirement", lock])
        run([*pip, *TARGET, "--no-index", "--upgrade", wheel])
        for pattern in LEFT_OUT:
            for path in sorted(packages.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in packages.rglob("*"):
            # pip records where files were installed from, and when.
            if (
                path.name in ("direct_url.json", "INSTALLER", "RECORD", "REQUESTED")
                and ".dist-info" in path.parent.name
            ):
                path.unlink()
            elif not path.is_symlink():
                os.utime(path, (epoch, epoch))
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
        library = f"{HOME}/lib/python{PYTHON_VERSION}/site-packages"
        if compiler:
            say("runtime: compiling byte code")
            arguments = ["-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"]
            arguments += ["-s", str(packages), "-p", library]
            run([*compiler, *arguments, packages], env={**os.environ, "PYTHONHASHSEED": "0"})
        with new_archive(target, epoch) as archive:
            add_environment(archive, packages)


def add_environment(archive: TreeArchive, packages: Path) -> None:
    """Add `FIRST_SLOT`, a virtual environment with the tree `packages` as its site-packages, and the links to it."""
    root = FIRST_SLOT[1:]
    archive.tree(packages, f"{root}/lib/python{PYTHON_VERSION}/site-packages")
    configuration = f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {PYTHON_VERSION}\n"
    archive.file(f"{root}/pyvenv.cfg", configuration)
    archive.link(f"{root}/bin/python", f"/usr/bin/python{PYTHON_VERSION}")
    archive.link(f"{root}/bin/python3", "python")
    for name, module in COMMANDS.items():
        archive.file(f"{root}/bin/{name}", SCRIPT.format(home=HOME, module=module), 0o755)
        archive.link(f"usr/local/bin/{name}", f"{HOME}/bin/{name}")
    archive.link(HOME[1:], Path(FIRST_SLOT).name)


def read_lock(lock: Path = LOCK) -> dict[str, str]:
    """Return the versions in the lock by normalized name."""
    pins = re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(encoding="utf-8"), re.MULTILINE)
    return {normalize(name): version for name, version in pins}


def normalize(name: str) -> str:
    """Return the name of a distribution as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lock_wheels(pyproject: Path, constraints: Path) -> str:
    """Return the text of a lock for the base install of `pyproject`, resolved for a board."""
    requirements = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    with tempfile.TemporaryDirectory(prefix="flexspec-lock-") as scratch:
        report = Path(scratch, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--target", scratch, "--report", str(report), "--constraint", str(constraints)]
        run([*command, *TARGET, *requirements])
        items = {normalize(item["metadata"]["name"]): item for item in json.loads(report.read_text())["install"]}
    lines = ["# Written by `make lock-wheels`: the wheels of a board, for aarch64 and Python 3.13."]
    for name in sorted(_needed(items, requirements)):
        item = items[name]
        hashes = item["download_info"]["archive_info"]["hashes"]
        lines.append(f"{name}=={item['metadata']['version']} --hash=sha256:{hashes['sha256']}")
    return "\n".join(lines) + "\n"


def _needed(items: Mapping[str, dict[str, dict[str, list[str]]]], requirements: Sequence[str]) -> set[str]:
    """Return the names that `requirements` lead to without NEVER_IMPORTED; `items` are pip's, by name."""
    needed: set[str] = set()
    pending = list(requirements)
    while pending:
        requirement = pending.pop()
        name = normalize(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])
        extras = set(re.findall(r"\w+", (re.search(r"\[(.*?)\]", requirement) or [""])[0]))
        if name not in items or (name in needed and not extras):
            continue
        needed.add(name)
        for dependency in items[name]["metadata"].get("requires_dist", []):
            extra = re.search(r"extra == ['\"]([\w-]+)['\"]", dependency)
            child = normalize(re.split(r"[^\w.-]", dependency, maxsplit=1)[0])
            wanted = extra is None or extra[1] in extras
            if wanted and child not in NEVER_IMPORTED.get(name, ()) and child not in needed:
                pending.append(dependency.partition(";")[0])
    return needed


if __name__ == "__main__":
    LOCK.write_text(lock_wheels(CHECKOUT / "pyproject.toml", CHECKOUT / "constraints.txt"), encoding="utf-8")
