"""What an image must have before a service is installed into it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.cli.main import main as edge_runtime
from edge_runtime.protocol.errors import InputError
from edge_runtime.systemd.image import choose_interpreter, find_in_image, missing_for_board
from tests.edge_runtime.systemd.test_units import skip_without

PYTHON = "/opt/flexspec/bin/python"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image whose virtual environment points to its own interpreter, as in Debian.

    Its version is one that this machine has not: where its own interpreter exists in the image, too, that is taken.
    """
    root = tmp_path / "image"
    for directory in ("usr/bin", "opt/flexspec/bin", "etc/flexspec", "var/lib"):
        (root / directory).mkdir(parents=True)
    (root / "usr/bin/python3.99").write_text("#!/bin/true\n")
    (root / "usr/bin/python3.99").chmod(0o755)
    (root / "usr/bin/python3").symlink_to("python3.99")
    (root / PYTHON[1:]).symlink_to("/usr/bin/python3")
    return root


def test_links_lead_inside_the_image(root: Path) -> None:
    assert find_in_image(root, Path(PYTHON)) == root / "usr/bin/python3.99"
    (root / "lib").symlink_to("../../usr/lib")
    assert find_in_image(root, Path("/lib/x")) == root / "usr/lib/x"
    (root / "a").symlink_to("/b")
    (root / "b").symlink_to("a")
    with pytest.raises(InputError, match="too many levels"):
        find_in_image(root, Path("/a/c"))


def test_the_interpreter_is_the_images(root: Path) -> None:
    assert choose_interpreter(root, Path(PYTHON)) == Path(PYTHON)
    with pytest.raises(InputError, match="there is no interpreter /opt/other/bin/python in"):
        choose_interpreter(root, Path("/opt/other/bin/python"))
    with pytest.raises(InputError, match="write its absolute path"):
        choose_interpreter(root, Path("bin/python"))
    # This machine's interpreter is not the image's, although it exists here.
    with pytest.raises(InputError, match="name its interpreter with --python"):
        choose_interpreter(root, None)
    (root / "usr/bin/python3.99").chmod(0o644)
    with pytest.raises(InputError, match="there is no interpreter"):
        choose_interpreter(root, Path(PYTHON))


def test_what_a_board_lacks_is_named(root: Path) -> None:
    configuration, bundle = missing_for_board(root, None, None, "flexspec")
    assert "there is no /etc/flexspec/config.toml" in configuration
    assert "there is no draft bundle at /var/lib/flexspec/bundles" in bundle
    config = root / "etc/flexspec/config.toml"
    config.write_text('[draft]\nbundle = "draft"\n')
    (missing,) = missing_for_board(root, None, None, "flexspec")
    assert "there is no draft bundle at /etc/flexspec/draft" in missing
    (root / "etc/flexspec/draft").mkdir()
    assert list(missing_for_board(root, None, None, "flexspec")) == []
    config.write_text("")
    # Where systemd keeps the state of a service with DynamicUser=.
    (root / "var/lib/private/flexspec/bundles/a").mkdir(parents=True)
    (root / "var/lib/private/flexspec/bundles/current").symlink_to("a")
    assert list(missing_for_board(root, None, None, "flexspec")) == []
    config.write_text("[draft\n")
    with pytest.raises(InputError, match=r"config\.toml: .*correct it there"):
        list(missing_for_board(root, None, None, "flexspec"))


def test_installing_into_an_image_without_the_files_changes_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skip_without("systemctl")
    install = ["service", "install", "--root", str(root)]
    for arguments, message in (
        ([], "there is no interpreter"),
        (["--python", PYTHON, "--config", "/etc/flexspec/lab.toml"], "there is no /etc/flexspec/lab.toml"),
        (["--python", PYTHON, "--", "--bundle", "/srv/draft"], "there is no /srv/draft"),
    ):
        assert edge_runtime([*install, *arguments]) == 2
        assert f"edge-runtime: {message}" in capsys.readouterr().err
    assert not (root / "etc/systemd").exists()
    assert edge_runtime([*install, "--python", PYTHON, "--now"]) == 0
    said = capsys.readouterr().err
    assert "note: there is no /etc/flexspec/config.toml" in said and "note: there is no draft bundle" in said
    assert f"ExecStart={PYTHON} -m" in (root / "etc/systemd/system/flexspec-edge.service").read_text()
