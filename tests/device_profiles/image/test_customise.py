"""Preparing a stock Raspberry Pi OS: what its boot partition gets, in an image and where it is mounted."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from device_profiles.image import customise as module
from device_profiles.image.boot_partition import ImagePartition, open_boot_partition
from device_profiles.image.customise import CustomiseOptions, customise
from edge_runtime.protocol.errors import InputError
from tests.device_profiles.first_boot.test_configure import FULL, KEY
from tests.device_profiles.image.small_image import build_small_image
from tests.device_profiles.programs import require_programs

# What a conversion of text would change.
BUNDLE = b"an archive of a bundle\r\n\xff\x00\n\r"


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CustomiseOptions:
    # The wheels of the lock come from the network; `make boot-test` installs the real runtime.
    def make_runtime(wheel: Path, directory: Path, epoch: int, say: object) -> Path:
        path = directory / "runtime.tar.gz"
        path.write_bytes(wheel.read_bytes())
        return path

    monkeypatch.setattr(module, "make_runtime", make_runtime)
    files = {"kitchen.toml": FULL.encode(), "board.pem": b"certificate", "me.pub": KEY.encode(), "b.tar.gz": BUNDLE}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "flexspec-1.whl", "w") as wheel:
        wheel.writestr("a", "b")
    return CustomiseOptions(
        wheel=tmp_path / "flexspec-1.whl",
        bundle=tmp_path / "b.tar.gz",
        configuration=tmp_path / "kitchen.toml",
        ssh_keys=[tmp_path / "me.pub"],
    )


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    directory = tmp_path / "bootfs"
    directory.mkdir()
    for name in ("config.txt", "cmdline.txt", "user-data", "meta-data", "network-config"):
        (directory / name).write_text("stock\n")
    return directory


@pytest.mark.slow
def test_a_mounted_partition_and_an_image_get_the_same_files(
    tmp_path: Path, mounted: Path, options: CustomiseOptions
) -> None:
    directory = tmp_path / "build"
    directory.mkdir()
    image, _ = build_small_image(directory)
    names = list(customise(mounted, options, print))
    assert list(customise(image, options, print)) == names
    partition = ImagePartition(image)
    for name in names:
        assert partition.read(name) == (mounted / name).read_bytes()
    # Once more, over the files of the first time.
    assert list(customise(image, options, print)) == names
    assert (mounted / "bundle.tar.gz").read_bytes() == BUNDLE
    assert (mounted / "flexspec.toml").read_text() == FULL
    assert (mounted / "config.txt").read_text() == "stock\n"


def test_cloud_init_creates_the_user_and_runs_the_installation(mounted: Path, options: CustomiseOptions) -> None:
    list(customise(mounted, options, print))
    first, text = (mounted / "user-data").read_text().split("\n", 1)
    settings = json.loads(text)
    assert first == "#cloud-config"
    assert settings["hostname"] == "kitchen"
    assert settings["ssh_pwauth"] is False
    [user] = settings["users"]
    assert (user["name"], user["lock_passwd"], user["ssh_authorized_keys"]) == ("flexspec", True, [KEY])
    script = Path("/boot/firmware/flexspec/install.sh")
    assert settings["runcmd"][-1] == ["sh", str(script)]
    assert (mounted / "flexspec" / script.name).is_file()
    assert (mounted / "meta-data").read_text().startswith("instance-id: flexspec-")
    # Its password would stay on the card; NetworkManager gets it from flexspec.toml.
    assert "wifi" not in (mounted / "network-config").read_text()


def test_the_installation_is_a_valid_script(mounted: Path, options: CustomiseOptions) -> None:
    list(customise(mounted, options, print))
    assert subprocess.run(["sh", "-n", mounted / "flexspec/install.sh"]).returncode == 0


def test_another_configuration_is_another_instance(mounted: Path, options: CustomiseOptions) -> None:
    list(customise(mounted, options, print))
    first = (mounted / "meta-data").read_text()
    list(customise(mounted, options._replace(user="me"), print))
    assert (mounted / "meta-data").read_text() != first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user": "Me And You"}, "is not a name of a user"),
        ({"ssh_keys": [Path("/etc/hostname")]}, "is not a public key"),
    ],
)
def test_mistakes_leave_the_partition_alone(
    mounted: Path, options: CustomiseOptions, change: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        list(customise(mounted, options._replace(**change), print))
    assert (mounted / "user-data").read_text() == "stock\n"
    assert not (mounted / "flexspec").exists()


def test_other_places_are_refused(tmp_path: Path, mounted: Path, options: CustomiseOptions) -> None:
    require_programs("mcopy")
    (mounted / "user-data").unlink()
    with pytest.raises(InputError, match="only Raspberry Pi OS since trixie reads cloud-init's files"):
        list(customise(mounted, options, print))
    for place, message in (
        (tmp_path / "none", "there is no"),
        (tmp_path, "is not the boot partition of a Raspberry Pi"),
        (tmp_path / "me.pub", "has no partition table: is it compressed"),
    ):
        with pytest.raises(InputError, match=message):
            open_boot_partition(place)
