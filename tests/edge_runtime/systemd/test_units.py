"""Unit files: checked by systemd's own tools, installed into an image, and removed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cloud_verifier.cli.main import UNIT
from cloud_verifier.cli.main import main as cloud_verifier
from edge_runtime.cli.main import main as edge_runtime
from edge_runtime.protocol.errors import InputError
from edge_runtime.systemd.actions import BOARD_UNIT
from edge_runtime.systemd.units import SYSTEMD_RUNNING, ServiceUnit, quote_argument, render_unit, validate_paths

UNITS = [BOARD_UNIT, UNIT]
# Stands in for the Python interpreter: systemd-analyze only checks that the program exists.
PYTHON = Path("/bin/true")


IMAGE_PYTHON = "/opt/flexspec/bin/python"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root directory of an image that has nothing but an interpreter."""
    skip_without("systemctl")
    python = tmp_path / "image" / IMAGE_PYTHON[1:]
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/true\n")
    python.chmod(0o755)
    return tmp_path / "image"


def skip_without(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"needs {program} (package systemd)")


def analyze(*arguments: str) -> str:
    skip_without("systemd-analyze")
    done = subprocess.run(["systemd-analyze", "--no-pager", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_analyze_finds_no_problem(unit: ServiceUnit, tmp_path: Path) -> None:
    path = tmp_path / f"{unit.name}.service"
    path.write_text(render_unit(unit, unit.name, PYTHON, ["--config", "/etc/my %n $HOME.toml"]))
    assert analyze("verify", str(path)) == ""
    exposure = re.search(r"exposure level for .*: ([0-9.]+)", analyze("security", "--offline=true", str(path)))
    assert exposure and float(exposure[1]) <= 1.5
    # The tool fails above this threshold, in tenths, which confirms the number parsed above.
    analyze("security", "--offline=true", "--threshold=15", str(path))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_all_placeholders_are_replaced_and_state_directories_are_separate(unit: ServiceUnit) -> None:
    default = render_unit(unit, unit.name, PYTHON, [])
    other = render_unit(unit, "lab", PYTHON, ["/srv/target"])
    assert "@" not in re.sub(r"^#.*|@(system-service|privileged|resources)\b", "", default, flags=re.MULTILINE)
    assert f"StateDirectory={unit.state_directory}\n" in default and "StateDirectory=lab\n" in other
    assert f"ExecStart=/bin/true -m {unit.module} serve /srv/target\n" in other


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("/srv/a-b_c.d:e", "/srv/a-b_c.d:e"),
        ("a b", '"a b"'),
        ('say "x"', '"say \\"x\\""'),
        ("$HOME %n", '"$$HOME %%n"'),
        ("back\\slash", '"back\\\\slash"'),
        ("", '""'),
        ("é;", '"é;"'),
    ],
)
def test_arguments_are_quoted(word: str, written: str) -> None:
    assert quote_argument(word) == written


def test_control_characters_are_refused() -> None:
    with pytest.raises(InputError, match="a unit file cannot hold control characters"):
        quote_argument("a\nExecStart=b")


def test_install_into_an_image_and_uninstall(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unit = root / "etc/systemd/system/flexspec-edge.service"
    wanted = root / "etc/systemd/system/multi-user.target.wants/flexspec-edge.service"
    (root / "etc/flexspec").mkdir(parents=True)
    (root / "etc/flexspec/lab.toml").touch()
    install = ["service", "install", "--root", str(root), "--python", IMAGE_PYTHON]
    assert edge_runtime(install) == 0
    assert f"{unit}: written" in capsys.readouterr().out
    assert "ExecStart=/opt/flexspec/bin/python -m edge_runtime.cli serve\n" in unit.read_text()
    assert unit.stat().st_mode & 0o777 == 0o644
    assert not wanted.is_symlink()

    before = unit.stat()
    assert edge_runtime([*install, "--now"]) == 0
    assert "unchanged" in capsys.readouterr().out
    assert (unit.stat().st_ino, unit.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert wanted.is_symlink()

    assert edge_runtime([*install, "--now", "--config", "/etc/flexspec/lab.toml", "--", "--max-waiting", "3"]) == 0
    assert "serve --max-waiting 3 --config /etc/flexspec/lab.toml\n" in unit.read_text()
    assert sorted(path.name for path in unit.parent.iterdir()) == ["flexspec-edge.service", "multi-user.target.wants"]

    assert edge_runtime(["service", "uninstall", "--root", str(root)]) == 0
    assert not unit.exists() and not wanted.is_symlink()
    assert edge_runtime(["service", "uninstall", "--root", str(root)]) == 0
    assert "not installed" in capsys.readouterr().out


def test_install_a_verifier_into_an_image(root: Path) -> None:
    arguments = ["--root", str(root), "--python", IMAGE_PYTHON, "--name", "flexspec-v2.service", "/srv/target-v2"]
    assert cloud_verifier(["service", "install", *arguments]) == 2
    (root / "srv/target-v2").mkdir(parents=True)
    assert cloud_verifier(["service", "install", *arguments, "--", "--device", "cuda"]) == 0
    text = (root / "etc/systemd/system/flexspec-v2.service").read_text()
    assert f"ExecStart={IMAGE_PYTHON} -m cloud_verifier.cli serve /srv/target-v2 --device cuda\n" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "a/b"], "'a/b' is not a valid name of a service"),
        (["--", "--bundle", "bundle"], "bundle: a service runs in /; write the absolute path"),
        (["--", "--bundle=/root/bundle"], "/root/bundle: a service cannot see files below /root"),
        (["--config", "/home/pi/config.toml"], "/home/pi/config.toml: a service cannot see files below /home"),
    ],
)
def test_a_service_that_could_not_start_is_not_installed(
    root: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edge_runtime(["service", "install", "--root", str(root), "--python", IMAGE_PYTHON, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in root.iterdir()] == ["opt"]


def test_unknown_options_of_serve_are_refused(root: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        edge_runtime(["service", "install", "--root", str(root), "--", "--no-such-option"])
    assert ended.value.code == 2
    assert [path.name for path in root.iterdir()] == ["opt"]


def test_a_failed_installation_changes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "etc").write_text("a file")
    assert edge_runtime(["service", "install", "--root", str(root), "--python", IMAGE_PYTHON, "--now"]) == 1
    assert "nothing was changed" in capsys.readouterr().err
    assert edge_runtime(["service", "install", "--root", str(root / "nowhere")]) == 2
    assert sorted(path.name for path in root.iterdir()) == ["etc", "opt"]


def test_symbolic_links_into_hidden_directories_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # pyenv creates such links for the interpreter of a virtual environment.
    monkeypatch.chdir("/tmp")
    with pytest.raises(InputError, match="/tmp/python: a service cannot see files below /tmp"):
        validate_paths([Path("/proc/self/cwd/python")])
    validate_paths([Path("/usr/bin/env"), Path("/opt/flexspec")])


def test_only_root_can_change_services(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for action in ("install", "uninstall"):
        assert edge_runtime(["service", action]) == 2
        assert "run this with sudo" in capsys.readouterr().err


def test_errors_on_a_machine_without_systemd(capsys: pytest.CaptureFixture[str]) -> None:
    if SYSTEMD_RUNNING.is_dir():
        pytest.skip("systemd runs this machine, and the test must not install anything")
    assert edge_runtime(["service", "install"]) == 2
    assert "run this with sudo" in (error := capsys.readouterr().err) or "systemd is not the init system" in error
    assert edge_runtime(["service", "status"]) == 1
    assert re.search("systemd is not the init system|systemctl is not installed", capsys.readouterr().err)
