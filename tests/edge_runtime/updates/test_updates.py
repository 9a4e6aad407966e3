"""Updates of the program in two slots, which are directories here; the service is a function."""

from __future__ import annotations

import errno
import hashlib
import io
import platform
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from device_profiles.cli import main as device_profile
from edge_runtime.protocol.errors import InputError
from edge_runtime.updates import package, slots
from edge_runtime.updates.package import UpdateDescription, UpdateError
from edge_runtime.updates.slots import Slots, SlotStatus
from export.bundle.sign import _read_private_key, generate_key_pair

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class Board:
    """A board with one version in slot a.

    Attributes:
        seen: the version that the service had at each of its starts.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.home = directory, directory / "root/opt/flexspec"
        slot = self.home.with_name("flexspec.a")
        (slot / "lib").mkdir(parents=True)
        (slot / "lib/version.py").write_text("image")
        self.home.symlink_to(slot.name)
        self.slots = Slots(self.home)
        self.seen: list[str] = []
        self.private = directory / "maker.key"
        self.public = generate_key_pair(self.private)

    def restart(self, *broken: str) -> Callable[[], None]:
        def restart() -> None:
            self.seen.append((self.home / "lib/version.py").read_text())
            if self.seen[-1] in broken:
                raise InputError("the service did not start")

        return restart

    def update(
        self, version: str, *, signed: bool = True, members: Sequence[tarfile.TarInfo] = (), **changes: str
    ) -> Path:
        """Make an update; `changes` are of its description, and `members` are added to the runtime."""
        runtime = io.BytesIO()
        with tarfile.open(fileobj=runtime, mode="w:gz") as tar:
            add(tar, "lib/version.py", version.encode())
            for member in members:
                tar.addfile(member)
            link = tarfile.TarInfo("bin/python")
            link.type, link.linkname = tarfile.SYMTYPE, sys.executable
            tar.addfile(link)
        digest = hashlib.sha256(runtime.getvalue()).hexdigest()
        fields = {
            "version": version,
            "python": PYTHON,
            "machine": platform.machine(),
            "runtime_sha256": digest,
            **changes,
        }
        text = msgspec.json.encode(UpdateDescription(**fields))
        path = self.directory / f"{version}.update"
        with tarfile.open(path, "w") as tar:
            add(tar, "update.json", text)
            if signed:
                add(tar, "update.sig", _read_private_key(self.private).sign(text))
            add(tar, "runtime.tar.gz", runtime.getvalue())
        return path


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path)


def test_an_update_is_used_and_can_be_undone(board: Board) -> None:
    assert board.slots.install(board.update("'2'"), board.public, board.restart()) == "'2'"
    assert board.seen == ["'2'"]
    status = board.slots.status()
    assert (status.active, status.version, status.other) == ("flexspec.b", "'2'", "as in the image")
    assert not status.on_trial
    assert list((board.home / "lib/__pycache__").iterdir())
    assert board.slots.rollback() == "as in the image"
    assert (board.home / "lib/version.py").read_text() == "image"
    # A third version replaces the one that is not in use.
    board.slots.rollback()
    board.slots.install(board.update("'3'"), board.public, board.restart())
    assert board.slots.status().other == "'2'"


def test_an_update_that_does_not_start_is_undone(board: Board) -> None:
    with pytest.raises(
        UpdateError, match=r"did not become ready \(the service did not start\); as in the image is in use"
    ):
        board.slots.install(board.update("'2'"), board.public, board.restart("'2'"))
    assert board.seen == ["'2'", "image"]
    # `rollback` must not lead to it.
    assert board.slots.status() == SlotStatus("flexspec.a", "as in the image", None, on_trial=False)
    with pytest.raises(InputError, match="there is no previous version"):
        board.slots.rollback()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_update_that_cannot_be_unpacked_leaves_both_versions(
    board: Board, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    board.slots.install(board.update("'2'"), board.public, board.restart())
    before = board.slots.status()

    def interrupt(slot: Path) -> None:
        raise error

    monkeypatch.setattr(slots, "_compile", interrupt)
    with pytest.raises((KeyboardInterrupt, UpdateError)):
        board.slots.install(board.update("'3'"), board.public, board.restart())
    assert board.slots.status() == before
    assert sorted(path.name for path in board.home.parent.iterdir()) == ["flexspec", "flexspec.a", "flexspec.b"]
    assert (board.home.with_name("flexspec.a") / "lib/version.py").read_text() == "image"


def test_a_power_cut_during_the_trial_undoes_the_update_at_boot(
    board: Board, capsys: pytest.CaptureFixture[str]
) -> None:
    # What is on the card then: the link to the new version, and the mark.
    board.slots.install(board.update("'2'"), board.public, board.restart())
    board.slots._trial.write_text("flexspec.a")
    boot = board.directory / "boot"
    boot.mkdir()
    arguments = ["configure", "--root", str(board.directory / "root"), "--boot", str(boot)]
    assert device_profile(arguments) == 2
    assert "an update of FlexSpec was interrupted" in (boot / "flexspec-errors.txt").read_text()
    assert (board.home / "lib/version.py").read_text() == "image"
    assert device_profile(arguments) == 0
    assert board.slots.status().other is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"python": "2.7"}, "is for Python 2.7"),
        ({"machine": "vax"}, "on vax, and this board has"),
        ({"runtime_sha256": "0" * 64}, "its runtime has another checksum"),
    ],
)
def test_updates_for_other_boards_and_damaged_ones_change_nothing(
    board: Board, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(UpdateError, match=message):
        board.slots.install(board.update("'2'", **changes), board.public, board.restart())
    assert board.seen == []
    assert board.slots.status().other is None


def test_only_the_makers_updates_are_installed(board: Board, tmp_path: Path) -> None:
    other = generate_key_pair(tmp_path / "other.key")
    for archive, key, message in (
        (board.update("'2'", signed=False), board.public, r"has no update\.sig"),
        (board.update("'3'"), other, "is not signed by a configured key"),
    ):
        with pytest.raises(UpdateError, match=message):
            board.slots.install(archive, key, board.restart())
    assert board.slots.install(board.update("'4'", signed=False), None, board.restart()) == "'4'"


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    return entry


@pytest.mark.parametrize(
    "members",
    [
        [member("../evil")],
        [member("lib/../../evil")],
        [member("/evil")],
        [member("lib/version.py")],
        [member("out", tarfile.SYMTYPE, ".."), member("out/evil")],
        [member("lib", tarfile.SYMTYPE, "..")],
        [member("evil", tarfile.LNKTYPE, "/etc/passwd")],
        [member("evil", tarfile.CHRTYPE)],
        [member("evil" * 40)],
    ],
    ids=[
        "upwards",
        "upwards later",
        "absolute",
        "twice",
        "through a link",
        "a link instead",
        "hard link",
        "device",
        "long",
    ],
)
def test_hostile_updates_write_nothing_outside_of_their_slot(board: Board, members: list[tarfile.TarInfo]) -> None:
    before = sorted(board.directory.rglob("*"))
    archive = board.update("'2'", members=members)
    with pytest.raises(UpdateError, match="nothing was changed"):
        board.slots.install(archive, board.public, board.restart())
    assert sorted(path for path in board.directory.rglob("*") if path != archive) == before
    assert board.seen == []


def test_a_link_is_made_after_all_files(board: Board) -> None:
    """As in a virtual environment: `lib64` is a link to `lib`, wherever it is in the archive."""
    board.slots.install(
        board.update("'2'", members=[member("lib64", tarfile.SYMTYPE, "lib"), member("lib/more.py")]),
        board.public,
        board.restart(),
    )
    assert (board.home / "lib64/more.py").is_file()


def test_an_update_has_a_bound(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "MAX_RUNTIME_BYTES", 1 << 13)
    archive = board.update("'2'", members=[member(f"lib/large-{number}") for number in range(20)])
    with pytest.raises(UpdateError, match=r"it unpacks to more than 8192 bytes\); nothing was changed"):
        board.slots.install(archive, board.public, board.restart())


def test_nothing_but_the_description_comes_before_the_signature(board: Board) -> None:
    archive = board.update("'2'")
    with tarfile.open(archive) as tar:
        contents = {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]
    with tarfile.open(archive, "w") as tar:
        for name in ("update.json", "runtime.tar.gz", "update.sig"):
            add(tar, name, contents[name])
    with pytest.raises(UpdateError, match=r"it has no update\.sig, or not in its place\); nothing was changed"):
        board.slots.install(archive, board.public, board.restart())


def test_other_files_are_no_updates(board: Board, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no archive")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    for name in ("text", "empty.tar"):
        with pytest.raises(UpdateError, match=r"nothing was changed"):
            board.slots.install(tmp_path / name, None, board.restart())
    with pytest.raises(InputError, match="there is no update at"):
        board.slots.install(tmp_path / "none", None, board.restart())


def test_an_installation_by_pip_is_not_switched(tmp_path: Path) -> None:
    (tmp_path / "flexspec").mkdir()
    with pytest.raises(InputError, match="update it with pip"):
        Slots(tmp_path / "flexspec")
    with pytest.raises(InputError, match="there is no previous version"):
        Board(tmp_path / "board").slots.rollback()
