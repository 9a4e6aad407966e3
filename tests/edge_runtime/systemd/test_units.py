"""Units: what is in them, judged by systemd's own tools, and how they come and go."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cloud_verifier.cli.main import UNIT, main
from edge_runtime.cli import main as edge
from edge_runtime.protocol.errors import InputError
from edge_runtime.systemd.actions import EDGE
from edge_runtime.systemd.units import RUNNING, Kind, check_paths, quoted, unit_text

KINDS = [EDGE, UNIT]
# Where an interpreter is not in an image for this test, any program will do.
PYTHON = Path("/bin/true")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root of an image."""
    needs("systemctl")
    (tmp_path / "image").mkdir()
    return tmp_path / "image"


def needs(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"needs {program} (package systemd)")


def analyze(*arguments: str) -> str:
    needs("systemd-analyze")
    done = subprocess.run(["systemd-analyze", "--no-pager", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_systemd_finds_nothing_to_complain_about(kind: Kind, tmp_path: Path) -> None:
    unit = tmp_path / f"{kind.name}.service"
    unit.write_text(unit_text(kind, kind.name, PYTHON, ["--config", "/etc/my %n $HOME.toml"]))
    assert analyze("verify", str(unit)) == ""
    exposure = re.search(r"exposure level for .*: ([0-9.]+)", analyze("security", "--offline=true", str(unit)))
    assert exposure and float(exposure[1]) <= 1.5
    # A threshold makes the tool fail where it is crossed, so that the figure above is what it seems.
    analyze("security", "--offline=true", "--threshold=15", str(unit))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_unit_leaves_no_blank_and_keeps_its_state_apart(kind: Kind) -> None:
    ours = unit_text(kind, kind.name, PYTHON, [])
    other = unit_text(kind, "lab", PYTHON, ["/srv/target"])
    assert "@" not in re.sub(r"^#.*|@(system-service|privileged|resources)\b", "", ours, flags=re.MULTILINE)
    assert f"StateDirectory={kind.state}\n" in ours and "StateDirectory=lab\n" in other
    assert f"ExecStart=/bin/true -m {kind.module} serve /srv/target\n" in other


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
def test_words_stay_words(word: str, written: str) -> None:
    assert quoted(word) == written


def test_a_line_break_is_no_part_of_a_word() -> None:
    with pytest.raises(InputError, match="a unit takes no such characters"):
        quoted("a\nExecStart=b")


def test_into_an_image_and_out_again(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unit = root / "etc/systemd/system/flexspec-edge.service"
    wanted = root / "etc/systemd/system/multi-user.target.wants/flexspec-edge.service"
    install = ["service", "install", "--root", str(root), "--python", "/opt/flexspec/bin/python"]
    assert edge.main(install) == 0
    assert f"{unit}: written" in capsys.readouterr().out
    assert "ExecStart=/opt/flexspec/bin/python -m edge_runtime.cli serve\n" in unit.read_text()
    assert unit.stat().st_mode & 0o777 == 0o644
    assert not wanted.is_symlink()

    before = unit.stat()
    assert edge.main([*install, "--now"]) == 0
    assert "as it was" in capsys.readouterr().out
    assert (unit.stat().st_ino, unit.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert wanted.is_symlink()

    assert edge.main([*install, "--now", "--config", "/etc/flexspec/lab.toml", "--", "--max-waiting", "3"]) == 0
    assert "serve --max-waiting 3 --config /etc/flexspec/lab.toml\n" in unit.read_text()
    assert sorted(path.name for path in unit.parent.iterdir()) == ["flexspec-edge.service", "multi-user.target.wants"]

    assert edge.main(["service", "uninstall", "--root", str(root)]) == 0
    assert not unit.exists() and not wanted.is_symlink()
    assert edge.main(["service", "uninstall", "--root", str(root)]) == 0
    assert "there is none" in capsys.readouterr().out


def test_a_verifier_into_an_image(root: Path) -> None:
    arguments = ["--root", str(root), "--name", "flexspec-v2.service", "/srv/target-v2"]
    assert main(["service", "install", *arguments, "--", "--device", "cuda"]) == 0
    text = (root / "etc/systemd/system/flexspec-v2.service").read_text()
    assert f"ExecStart={sys.executable} -m cloud_verifier.cli serve /srv/target-v2 --device cuda\n" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--name", "a/b"], "'a/b' is no name for a service"),
        (["--", "--bundle", "bundle"], "bundle: a service starts in /; write the whole path"),
        (["--", "--bundle=/root/bundle"], "/root/bundle: a service sees nothing below /root"),
        (["--config", "/home/pi/config.toml"], "/home/pi/config.toml: a service sees nothing below /home"),
    ],
)
def test_what_could_not_start_is_not_installed(
    root: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edge.main(["service", "install", "--root", str(root), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert list(root.iterdir()) == []


def test_options_that_serve_does_not_know_are_refused(root: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        edge.main(["service", "install", "--root", str(root), "--", "--no-such-option"])
    assert ended.value.code == 2
    assert list(root.iterdir()) == []


def test_an_image_that_cannot_be_written_stays_as_it_is(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "etc").write_text("a file")
    assert edge.main(["service", "install", "--root", str(root), "--now"]) == 1
    assert "nothing was changed" in capsys.readouterr().err
    assert edge.main(["service", "install", "--root", str(root / "nowhere")]) == 2
    assert [path.name for path in root.iterdir()] == ["etc"]


def test_a_link_to_where_a_service_sees_nothing_is_seen_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As pyenv makes of an interpreter in a virtual environment.
    monkeypatch.chdir("/tmp")
    with pytest.raises(InputError, match="/tmp/python: a service sees nothing below /tmp"):
        check_paths([Path("/proc/self/cwd/python")])
    check_paths([Path("/usr/bin/env"), Path("/opt/flexspec")])


def test_services_are_roots(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for action in ("install", "uninstall"):
        assert edge.main(["service", action]) == 2
        assert "run this with sudo" in capsys.readouterr().err


def test_a_machine_without_systemd(capsys: pytest.CaptureFixture[str]) -> None:
    if RUNNING.is_dir():
        pytest.skip("systemd runs this machine, and nothing is to be installed here")
    assert edge.main(["service", "install"]) == 2
    assert "run this with sudo" in (said := capsys.readouterr().err) or "systemd does not run this machine" in said
    assert edge.main(["service", "status"]) == 1
    assert "systemctl" in capsys.readouterr().err
