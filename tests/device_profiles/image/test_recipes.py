"""Recipes, the lock of wheels, and the parts of images that need no Debian packages."""

from __future__ import annotations

import re
import subprocess
import tarfile
import tomllib
from pathlib import Path

import pytest

from device_profiles.cli import main
from device_profiles.image.archives import new_archive
from device_profiles.image.base_root import base_key
from device_profiles.image.boot_files import boot_directory
from device_profiles.image.kernel import INIT, Kernel, build_initrd
from device_profiles.image.packages import Mirrors, PackageFile
from device_profiles.image.recipe import ImageRecipe, read_recipe, recipe_names
from device_profiles.image.runtime import CHECKOUT, NEVER_IMPORTED, _needed, normalize, read_lock
from device_profiles.image.system_files import add_system_files
from edge_runtime.planning.board_profile import find_profile
from edge_runtime.protocol.errors import InputError
from edge_runtime.settings.loading import read_effective_settings
from tests.device_profiles.programs import require_programs

EPOCH = 1_760_000_000
RECIPES = {name: read_recipe(name) for name in recipe_names()}


def extract(archive: tarfile.TarFile, directory: Path) -> None:
    """Unpack an archive of our own; Python 3.11.2 of Debian 12 knows no filters yet."""
    archive.extraction_filter = getattr(tarfile, "tar_filter", None)
    archive.extractall(directory)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes_name_what_exists(recipe: ImageRecipe) -> None:
    assert recipe.kernel(None).package.startswith("linux-image-arm64")
    if recipe.profile:
        find_profile(recipe.profile)
    assert bool(recipe.device_trees) == recipe.raspberry_pi


def test_a_raspberry_pi_5_has_large_pages_and_others_small_ones() -> None:
    assert {
        name: recipe.kernel(None).package for name, recipe in RECIPES.items() if "16k" in recipe.kernel(None).package
    } == {"rpi5": "linux-image-arm64-16k"}
    with pytest.raises(InputError, match="has no kernel with 16k pages; choose 4k"):
        RECIPES["rpi3"].kernel("16k")


def test_an_unknown_board_is_refused() -> None:
    with pytest.raises(InputError, match="the boards are generic-arm64, rpi3"):
        read_recipe("rpi6")
    with pytest.raises(SystemExit):
        main(["image", "build", "--board", "rpi6"])


def test_the_lock_covers_the_dependencies_of_the_base_install() -> None:
    """After a change of the dependencies, run `make lock-wheels`."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    lock = read_lock()
    assert {normalize(re.split(r"[^\w.-]", entry)[0]) for entry in project["dependencies"]} <= set(lock)
    assert not {"torch", "transformers", "huggingface-hub", "hf-xet"} & set(lock)
    constraints = dict(re.findall(r"^([\w.-]+)==(\S+)", (CHECKOUT / "constraints.txt").read_text(), re.MULTILINE))
    pinned = {normalize(name): version for name, version in constraints.items()}
    assert {name: version for name, version in lock.items() if pinned.get(name, version) != version} == {}


def test_what_is_never_imported_is_left_out_with_all_that_it_alone_brings() -> None:
    def item(name: str, *requires: str) -> dict[str, dict[str, list[str]]]:
        return {"metadata": {"name": [name], "requires_dist": list(requires)}}

    items = {
        "tokenizers": item("tokenizers", "huggingface-hub>=0.16", "tests; extra == 'dev'"),
        "huggingface-hub": item("huggingface-hub", "hf-xet", "packaging"),
        "hf-xet": item("hf-xet"),
        "httpx": item("httpx", "anyio", 'h2<5,>=3; extra == "http2"', "brotli; extra == 'brotli'"),
        "h2": item("h2"),
        "anyio": item("anyio", "packaging"),
        "packaging": item("packaging"),
    }
    assert _needed(items, ["tokenizers>=0.21", "httpx[http2]>=0.28"]) == {
        "tokenizers",
        "httpx",
        "h2",
        "anyio",
        "packaging",
    }
    assert NEVER_IMPORTED["tokenizers"] == {"huggingface-hub"}


def test_mirrors_become_sources() -> None:
    lines = Mirrors("http://mirror.example/debian", "http://mirror.example/security").sources("[signed-by=/k.gpg]")
    assert lines[0] == "deb [signed-by=/k.gpg] http://mirror.example/debian trixie main non-free-firmware"
    assert "deb [signed-by=/k.gpg] http://mirror.example/security trixie-security main non-free-firmware" in lines
    assert Mirrors().sources()[0] == "deb http://deb.debian.org/debian trixie main non-free-firmware"


def test_the_base_is_cached_by_the_content_of_its_packages() -> None:
    one, two = PackageFile("a_1_arm64.deb", "SHA256:1", 5), PackageFile("a_1_arm64.deb", "SHA256:2", 5)
    assert base_key([one]) == base_key([one]) != base_key([two])
    assert (one.package, PackageFile("curl_1%3a8.2-1~deb13u1_arm64.deb", "", 0).version) == ("a", "1:8.2-1~deb13u1")


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    """A kernel with one module that depends on another; neither is a real one."""
    release = "6.12.0-test"
    modules = tmp_path / "lib/modules" / release
    (modules / "kernel/fs/ext4").mkdir(parents=True)
    (modules / "kernel/lib").mkdir()
    (modules / "kernel/fs/ext4/ext4.ko").write_bytes(b"module")
    (modules / "kernel/lib/crc.ko").write_bytes(b"dependency")
    (modules / "kernel/lib/other.ko").write_bytes(b"other")
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        (modules / name).write_bytes(b"")
    dep = "kernel/fs/ext4/ext4.ko: kernel/lib/crc.ko\nkernel/lib/crc.ko:\nkernel/lib/other.ko:\n"
    (modules / "modules.dep").write_text(dep)
    trees = tmp_path / "dtb/broadcom"
    trees.mkdir(parents=True)
    for name in ("bcm2711-rpi-4-b", "bcm2711-rpi-400", "bcm2712-rpi-5-b"):
        (trees / f"{name}.dtb").write_bytes(b"tree")
    image = tmp_path / "vmlinuz"
    image.write_bytes(b"kernel")
    return Kernel(release, image, modules, tmp_path / "dtb")


def test_the_initial_ram_disk_is_what_the_kernel_unpacks(kernel: Kernel, tmp_path: Path) -> None:
    require_programs("depmod", "cpio")
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"busybox")
    packed = build_initrd(kernel, busybox, tmp_path)
    root = tmp_path / "unpacked"
    root.mkdir()
    unpack = "gzip -d | cpio --extract --quiet --no-absolute-filenames"
    subprocess.run(["sh", "-c", unpack], input=packed, cwd=root, check=True)
    assert (root / "init").read_text() == INIT
    assert (root / "bin/switch_root").readlink() == Path("busybox")
    assert (root / "dev/console").is_char_device()
    assert sorted(path.name for path in root.rglob("*.ko")) == ["crc.ko", "ext4.ko"]
    (tmp_path / "again").mkdir()
    assert build_initrd(kernel, busybox, tmp_path / "again") == packed


def test_a_raspberry_pi_gets_firmware_and_only_its_own_device_trees(kernel: Kernel, tmp_path: Path) -> None:
    firmware = tmp_path / "extra/usr/lib/raspi-firmware"
    firmware.mkdir(parents=True)
    for name in RECIPES["rpi4"].firmware:
        (firmware / name).write_bytes(b"firmware")
    boot_directory(RECIPES["rpi4"], kernel, b"initrd", tmp_path / "extra", tmp_path / "boot")
    names = {path.name for path in (tmp_path / "boot").iterdir()}
    assert {"vmlinuz", "initrd.img", "start4.elf", "fixup4.dat", "config.txt", "flexspec.toml"} <= names
    assert {name for name in names if name.endswith(".dtb")} == {"bcm2711-rpi-4-b.dtb", "bcm2711-rpi-400.dtb"}
    [command_line] = (tmp_path / "boot/cmdline.txt").read_text().splitlines()
    assert command_line.startswith("root=LABEL=flexroot ro ")
    assert command_line.endswith("console=tty1")


def test_system_files_have_no_password_and_enable_the_service(tmp_path: Path) -> None:
    path = tmp_path / "system.tar"
    for _ in range(2):
        with new_archive(path, EPOCH) as archive:
            add_system_files(archive, "rpi4", RECIPES["rpi4"], "0.1.0", None)
        content = path.read_bytes()
    assert path.read_bytes() == content
    root = tmp_path / "root"
    with tarfile.open(path) as tar:
        assert {(entry.uid, entry.gid, entry.mtime) for entry in tar} == {(0, 0, EPOCH)}
        extract(tar, root)
    assert "PasswordAuthentication no" in (root / "etc/ssh/sshd_config.d/flexspec.conf").read_text()
    wants = root / "etc/systemd/system/multi-user.target.wants/flexspec-edge.service"
    assert wants.readlink() == Path("/etc/systemd/system/flexspec-edge.service")
    assert (
        "ExecStart=/opt/flexspec/bin/python -m edge_runtime.cli serve"
        in (root / "etc/systemd/system/flexspec-edge.service").read_text()
    )
    # A boot partition that is missing must not keep a board without a screen from starting.
    assert "nofail" in next(line for line in (root / "etc/fstab").read_text().splitlines() if "FLEXBOOT" in line)
    settings = read_effective_settings(root / "etc/flexspec/config.toml", {}).settings
    assert settings.planner.profile == "raspberry-pi-4"


def test_units_are_what_systemd_understands(tmp_path: Path) -> None:
    require_programs("systemd-analyze")
    with new_archive(tmp_path / "system.tar", EPOCH) as archive:
        add_system_files(archive, "rpi4", RECIPES["rpi4"], "0.1.0", None)
    with tarfile.open(tmp_path / "system.tar") as tar:
        extract(tar, tmp_path)
    for name in ("flexspec-configure.service", "flexspec-ssh-keys.service"):
        unit = tmp_path / "etc/systemd/system" / name
        # The programs are those of the board.
        unit.write_text(re.sub(r"^ExecStart=.*$", "ExecStart=/bin/true", unit.read_text(), flags=re.MULTILINE))
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
        ours = [line for line in done.stderr.splitlines() if name in line]
        assert ours == [], ours
