"""`device-profile configure` on the root file systems of boards, which are directories here."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from device_profiles.cli import main
from device_profiles.first_boot import report
from device_profiles.first_boot.board_file import STORED
from device_profiles.image.boot_files import TEMPLATE
from edge_runtime.settings.loading import read_effective_settings

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8x1yG8m4K0Yp3vY2q0m7c1o8T2S0zq1vWc0Zk3aB1d me@laptop"
PASSWORD, TOKEN, API_KEY = "correct horse \\ battery", "token-of-the-verifier", "key-of-the-board"
PRIVATE_KEY = r"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
FULL = f"""\
# The board in the kitchen.
[board]
hostname = "kitchen"
timezone = "Europe/Berlin"

[wifi]
ssid = "Küche"
password = "{PASSWORD.replace(chr(92), chr(92) * 2)}"   # of the guests' network
country = "DE"

[ssh]
keys = ["{KEY}"]

[secrets]
verifier_token = "{TOKEN}"
api_key = "{API_KEY}"
verifier_key = "{PRIVATE_KEY}"

[verifier]
urls = ["https://verifier.example"]
certificate_file = "board.pem"

[planner]
objective = "cloud"
"""


class Board:
    """A board: its root file system, its boot partition, and its LEDs."""

    def __init__(self, directory: Path) -> None:
        self.root, self.boot, self.sysfs = (directory / name for name in ("root", "boot", "sys"))
        for path in (self.root / "etc", self.boot, self.sysfs / "class/leds/ACT"):
            path.mkdir(parents=True)
        (self.root / "etc/hosts").write_text("127.0.0.1\tlocalhost\n127.0.1.1\tflexspec\n")
        (self.boot / "board.pem").write_text("certificate")

    def configure(self, text: str | None = None) -> int:
        if text is not None:
            (self.boot / "flexspec.toml").write_text(text)
        return main(["configure", "--root", str(self.root), "--boot", str(self.boot)])

    def read(self, name: str) -> str:
        return (self.root / name).read_text()

    @property
    def file(self) -> str:
        return (self.boot / "flexspec.toml").read_text()

    @property
    def errors(self) -> str:
        path = self.boot / report.ERRORS_NAME
        return path.read_text() if path.exists() else ""


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    board = Board(tmp_path)
    show = report.report
    monkeypatch.setattr(report, "report", lambda root, boot, errors: show(root, boot, errors, board.sysfs))
    return board


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_everything_is_applied(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    assert board.configure(FULL) == 0
    assert board.read("etc/hostname") == "kitchen\n"
    assert board.read("etc/hosts") == "127.0.0.1\tlocalhost\n127.0.1.1\tkitchen\n"
    assert (board.root / "etc/localtime").readlink() == Path("/usr/share/zoneinfo/Europe/Berlin")
    assert KEY in board.read("root/.ssh/authorized_keys").splitlines()
    assert mode(board.root / "root/.ssh/authorized_keys") == 0o600
    assert mode(board.root / "root/.ssh") == 0o700
    assert "ieee80211_regdom=DE" in board.read("etc/modprobe.d/flexspec-wifi.conf")
    settings = read_effective_settings(board.root / "etc/flexspec/config.toml", {}).settings
    assert settings.verifier.urls == ["https://verifier.example"]
    assert settings.verifier.certificate_file == board.root / "etc/flexspec/board.pem"
    assert settings.planner.objective == "cloud"
    said = capsys.readouterr().out
    assert "host name kitchen" in said
    assert not any(secret in said for secret in (PASSWORD, TOKEN, API_KEY))


def test_wifi_is_written_for_networkmanager(board: Board) -> None:
    board.configure(FULL)
    connection = board.root / "etc/NetworkManager/system-connections/flexspec-wifi.nmconnection"
    # NetworkManager ignores files that others may read.
    assert mode(connection) == 0o600
    lines = connection.read_text().splitlines()
    assert f"ssid={';'.join(map(str, 'Küche'.encode()))};" in lines
    assert "psk=correct horse \\\\ battery" in lines


def test_secrets_become_credentials_and_leave_the_boot_partition(board: Board) -> None:
    board.configure(FULL)
    store = board.root / "etc/credstore"
    assert mode(store) == 0o700
    for name, secret in (
        ("flexspec.verifier-token", TOKEN),
        ("flexspec.api-key", API_KEY),
        ("flexspec.verifier-key", PRIVATE_KEY.replace(r"\n", "\n")),
    ):
        assert (store / name).read_text() == secret
        assert mode(store / name) == 0o600
    content = b"".join(path.read_bytes() for path in board.boot.iterdir())
    assert not any(secret.encode() in content for secret in (PASSWORD, "correct horse", TOKEN, API_KEY))
    # Everything else stays as it was written, comments included.
    assert board.file.replace(STORED, "") == FULL.replace(PASSWORD.replace("\\", "\\\\"), "").replace(
        TOKEN, ""
    ).replace(API_KEY, "").replace(PRIVATE_KEY, "")


def test_the_next_boot_changes_nothing(board: Board) -> None:
    board.configure(FULL)
    before = {path: path.stat().st_mtime_ns for path in board.root.rglob("*")}
    assert board.configure() == 0
    after = {path: path.stat().st_mtime_ns for path in board.root.rglob("*")}
    issue = board.root / report.ISSUE
    assert {path for path in after if after[path] != before.get(path)} <= {issue}


def test_a_later_change_keeps_the_stored_secrets(board: Board) -> None:
    board.configure(FULL)
    assert board.configure(board.file.replace("kitchen", "garage").replace('objective = "cloud"', "")) == 0
    assert board.read("etc/hostname") == "garage\n"
    assert board.read("etc/credstore/flexspec.verifier-token") == TOKEN
    assert "psk=correct horse \\\\ battery" in board.read(
        "etc/NetworkManager/system-connections/flexspec-wifi.nmconnection"
    )
    assert "objective" not in board.read("etc/flexspec/config.toml")


def test_what_is_removed_from_the_file_is_removed_from_the_board(board: Board) -> None:
    board.configure(FULL)
    assert board.configure('[board]\nhostname = "kitchen"\n') == 0
    assert list((board.root / "etc/credstore").iterdir()) == []
    assert not (board.root / "etc/NetworkManager/system-connections/flexspec-wifi.nmconnection").exists()


def test_a_new_board_does_not_have_the_secrets_of_another_one(board: Board) -> None:
    assert board.configure(FULL.replace(TOKEN, STORED)) == 2
    assert "secrets.verifier_token: this board has not stored it; write the secret again" in board.errors


def test_mistakes_change_nothing_and_are_reported_everywhere(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    board.configure(FULL)
    before = board.read("etc/flexspec/config.toml")
    wrong = (
        '[board]\nhostname = "The Kitchen"\n[verifier]\nurls = ["verifier"]\n[wlan]\n[planner]\nobjectiv = "cloud"\n'
    )
    assert board.configure(wrong) == 2
    assert board.read("etc/hostname") == "kitchen\n"
    assert board.read("etc/flexspec/config.toml") == before
    assert board.file == wrong
    expected = (
        "flexspec.toml:2:1: board.hostname: 'The Kitchen' is not a host name",
        "flexspec.toml:4:1: verifier.urls: 'verifier' is not a URL",
        'flexspec.toml:5:1: there is no table "wlan"',
        "flexspec.toml:7:1: planner.objectiv: there is no such field; did you mean objective?",
    )
    console = capsys.readouterr().err
    for line in expected:
        assert line in board.errors
        assert line in console
        assert line in board.read(report.ISSUE)
    led = board.sysfs / "class/leds/ACT"
    assert (led / "trigger").read_text() == "timer"
    assert (led / "delay_on").read_text() == (led / "delay_off").read_text() == "1500"
    # Once they are corrected, they are no longer shown.
    assert board.configure('[board]\nhostname = "pantry"\n') == 0
    assert board.errors == ""
    assert "is not a host name" not in board.read(report.ISSUE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[board", r"flexspec\.toml:1:\d+: not TOML"),
        ("[board]\nhostnam = 'a'\n", "board.hostnam: there is no such field; [board] has hostname, timezone"),
        ("[board]\nhostname = 7\n", "board.hostname: Expected `str`, got `int`"),
        ("board = 3\n", "board: Expected `object`, got `int`"),
        ("[board]\ntimezone = '../../etc/passwd'\n", "is not a time zone"),
        ("[wifi]\nssid = 'a'\npassword = 'correct horse'\n", "wifi.country: the radio needs its country"),
        ("[wifi]\nssid = 'a'\ncountry = 'DE'\npassword = 'short'\n", "wifi.password: must have 8 to 63"),
        ("[wifi]\npassword = 'correct horse'\n", "wifi.ssid: the name of the network is missing"),
        ("[ssh]\nkeys = ['-----BEGIN OPENSSH PRIVATE KEY-----']\n", "ssh.keys: this is a private key"),
        ("[ssh]\nkeys = ['me@laptop']\n", "'me@laptop' is not a public key"),
        ("[secrets]\nverifier_token = 'two words'\n", "secrets.verifier_token: must be one line"),
        ("[verifier]\ntoken = 'abc'\n", "verifier.token: secrets do not belong here"),
        # What `serve` would refuse.
        (
            "[verifier]\nurls = ['http://192.168.1.20:8500']\n",
            r"flexspec\.toml:1:1: verifier: prompts and answers would be",
        ),
        (
            "[secrets]\nverifier_token = 'abc'\n[verifier]\nurls = ['http://192.168.1.20:8500']\ninsecure = true\n",
            "verifier: the token would be sent to http://192.168.1.20:8500 unencrypted",
        ),
        ("[verifier]\ncertificate_file = 'board.pem'\n", "verifier: --client-certificate and --client-key go together"),
    ],
)
def test_every_mistake_has_its_words(board: Board, text: str, message: str) -> None:
    import re

    assert board.configure(text) == 2
    assert re.search(message if message.startswith("flexspec") else re.escape(message), board.errors)
    assert not (board.root / "etc/hostname").exists()


def test_the_template_of_an_image_is_valid(board: Board) -> None:
    assert board.configure(TEMPLATE.format(profile='profile = "raspberry-pi-5"\n')) == 0
    uncommented = "\n".join(
        line.removeprefix("# ").replace('"..."', '"correct-horse"').replace("AAAA... me", KEY.split(" ", 1)[1][:-7])
        for line in TEMPLATE.format(profile="").splitlines()[4:]
    )
    assert board.configure(uncommented) == 0
    assert board.read("etc/hostname") == "kitchen\n"


def test_a_board_without_the_file_starts(board: Board) -> None:
    assert board.configure() == 0
    assert board.errors == ""


def test_a_board_without_an_led_starts(board: Board) -> None:
    (board.sysfs / "class/leds/ACT").rmdir()
    assert board.configure("[board") == 2


def test_a_file_is_checked_anywhere(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    (board.boot / "flexspec.toml").write_text(FULL)
    assert main(["configure", "--check", str(board.boot / "flexspec.toml")]) == 0
    assert board.file == FULL
    assert not (board.root / "etc/hostname").exists()


@pytest.mark.slow
def test_a_draft_on_the_boot_partition_is_installed_once(
    board: Board, toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tarfile

    archive = board.boot / "bundle.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(toy_bundle, "bundle")
    assert board.configure() == 0
    current = board.root / "var/lib/flexspec/bundles/current"
    assert current.is_dir()
    assert "installed" in capsys.readouterr().out
    assert board.configure() == 0
    assert "installed" not in capsys.readouterr().out
    archive.write_bytes(b"damaged")
    assert board.configure() == 2
    assert "bundle.tar.gz could not be installed" in board.errors
    assert current.is_dir()
