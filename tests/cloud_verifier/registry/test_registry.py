"""The registry on disk: changed by hand, by several at once, and on a full disk."""

from __future__ import annotations

import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_verifier.registry.catalog import Alias, Entry, Roster, Setting, Unknown
from cloud_verifier.registry.compatibility import Incompatible
from cloud_verifier.registry.registry import FILE, HEADING, Registry, RegistryError
from edge_runtime.protocol.errors import BundleMissing, InputError, TargetError
from tests.models import save_target

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
MOMENTS = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))
PATHS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30)

CHANGING = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from cloud_verifier.versions.registry import Registry
from cloud_verifier.versions.roster import Entry
registry = Registry(Path(sys.argv[1]))
for index in range(20):
    entry = Entry(f"{sys.argv[2]}-{index}@{'a' * 12}", "x", "adapter", "shared", datetime.now(UTC))
    registry.change(lambda roster: roster.add(entry))
"""
FULL = """
import resource, signal, sys
from pathlib import Path
from cloud_verifier.versions.registry import Registry, RegistryError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
registry = Registry(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
try:
    registry.promote("stable", "v0")
except RegistryError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@st.composite
def rosters(draw: st.DrawFn) -> Roster:
    names = draw(st.lists(NAMES, min_size=1, max_size=5, unique=True))
    entries = [
        Entry(
            f"{name}@{draw(st.from_regex('[0-9a-f]{12}', fullmatch=True))}",
            draw(PATHS),
            draw(st.sampled_from(["checkpoint", "adapter", "changes"])),
            draw(st.sampled_from(["shared", "unshared"])),
            draw(MOMENTS),
        )
        for name in names
    ]
    versions = st.sampled_from([entry.version for entry in entries])

    def setting() -> Setting:
        canary = draw(st.dictionaries(versions, st.floats(0.1, 20), max_size=3))
        return Setting(draw(versions), draw(MOMENTS), canary)

    aliases = draw(st.lists(NAMES.filter(lambda name: name not in names), max_size=3, unique=True))
    return Roster(
        default=draw(NAMES),
        roots=draw(st.lists(PATHS, max_size=2)),
        drafts=draw(st.lists(PATHS, max_size=2)),
        targets=entries,
        aliases={name: Alias(setting(), [setting() for _ in range(draw(st.integers(0, 3)))]) for name in aliases},
    )


def registry_of(path: Path, *names: str) -> Registry:
    registry = Registry(path)
    for name in names:
        entry = Entry(f"{name}@{'a' * 12}", name, "adapter", "shared", datetime.now(UTC))
        registry.change(lambda roster, entry=entry: roster.add(entry))  # type: ignore[misc]
    return registry


@settings(max_examples=60, deadline=None)
@given(roster=rosters())
def test_what_is_written_is_read_again(roster: Roster, tmp_path_factory: pytest.TempPathFactory) -> None:
    registry = Registry(tmp_path_factory.mktemp("registry"))
    assert registry.change(lambda _: roster) == registry.read() == roster


def test_the_file_is_for_people(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, "v0", "v1")
    registry.canary("latest", "v1", 5)
    text = registry.file.read_text()
    assert text.startswith(HEADING)
    assert '[aliases.latest.now.canary]\n"v1@aaaaaaaaaaaa" = 5.0' in text
    registry.file.write_text(text.replace("= 5.0", "= 50").replace("\n\n", "\n# a word\n\n"))
    assert registry.read().aliases["latest"].now.canary == {f"v1@{'a' * 12}": 50.0}


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("format_version = 1", "format_version = 2", "upgrade"),
        ("format_version = 1", "", "format None"),
        ('kind = "adapter"', 'kind = "apple"', "kind"),
        ('[[targets]]\nversion = "v0', '[[targets]]\nversion = "v7', "not among the targets"),
        ("aaaaaaaaaaaa", "beef", "no version"),
        ('[aliases.latest.now]\nversion = "v0', '[aliases.latest.now]\nversion = "v9', "not among the targets"),
        ("[aliases.latest", "[aliases.v1", "cannot be an alias"),
        ("default", "defautl", "unknown field"),
        ("= 5.0", "= 500", "100"),
        ("= 5.0", "= [5", "makes no sense"),
        ('path = "v1"', 'path = "v1"\nretired = 2026-01-01T00:00:00Z', "which is retired"),
        ("[[targets]]", "\0", "makes no sense"),
    ],
)
def test_a_file_changed_by_hand_is_checked_and_never_overwritten(tmp_path: Path, old: str, new: str, why: str) -> None:
    registry = registry_of(tmp_path, "v0", "v1")
    registry.canary("latest", "v1", 5)
    text = registry.file.read_text()
    assert old in text
    registry.file.write_text(text.replace(old, new))
    for attempt in (registry.read, lambda: registry.promote("latest", "v1")):
        with pytest.raises(RegistryError, match=why) as caught:
            attempt()
        assert str(registry.file) in str(caught.value)
    assert registry.file.read_text() == text.replace(old, new)


def test_bytes_that_are_no_text_and_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="targets add"):
        Registry(tmp_path / "nothing").read()
    assert not (tmp_path / "nothing").exists()
    (tmp_path / FILE).write_bytes(b"\xff\xfe" * 100)
    with pytest.raises(RegistryError, match="makes no sense"):
        Registry(tmp_path).read()
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match="cannot"):
        registry_of(tmp_path / "file", "v0")


def test_a_change_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, "v0", "v1")
    before, stamp = registry.file.read_bytes(), registry.stamp()
    for attempt in (
        lambda: registry.promote("latest", "v7"),
        lambda: registry.canary("latest", "v1", 101),
        lambda: registry.rollback("latest"),
        lambda: registry.retire("v0"),
    ):
        with pytest.raises(InputError):
            attempt()
    assert (registry.file.read_bytes(), registry.stamp()) == (before, stamp)
    registry.promote("latest", "v1")
    assert registry.stamp() != stamp


def test_several_processes_lose_none_of_each_others_changes(tmp_path: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", CHANGING, str(tmp_path), name]) for name in ("a", "b", "c")]
    seen: set[int] = set()
    while any(process.poll() is None for process in processes):
        if (tmp_path / FILE).exists():
            seen.add(len(Registry(tmp_path).read().targets))  # whole, whenever one looks
    assert [process.returncode for process in processes] == [0, 0, 0]
    roster = Registry(tmp_path).read()
    assert {entry.name for entry in roster.targets} == {f"{name}-{i}" for name in "abc" for i in range(20)}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", FILE]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, "v0", "v1")
    before = registry.file.read_bytes()
    assert len(before) > 300
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "nothing was changed" in done.stdout
    assert registry.file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", FILE]
    registry.promote("stable", "v0")


@pytest.fixture
def own(tmp_path: Path, family: Path) -> Registry:
    """A registry with target v1 of the family and its draft."""
    registry = Registry(tmp_path / "registry")
    registry.add_draft(family / "bundle")
    registry.add(str(family / "target-v1"))
    return registry


def test_versions_that_kept_what_drafts_share_come_in(own: Registry, family: Path) -> None:
    entries = [own.add(str(family / name)) for name in ("target-v2", "target-v3", "target-v4")]
    assert [(entry.name, entry.kind, entry.admitted) for entry in entries] == [
        ("target-v2", "adapter", "shared"),
        ("target-v3", "adapter", "shared"),
        ("target-v4", "changes", "shared"),
    ]
    listed = {one.version: one for one in own.listing(own.read())}
    assert len(listed) == 4
    assert all(one.state == "active" and not one.problem for one in listed.values())
    assert own.locate(str(family / "target-v2"), own.read()) == own.path_of(entries[0])


def test_one_that_did_not_stays_out_unless_it_is_asked_in(own: Registry, tmp_path: Path) -> None:
    foreign = save_target(tmp_path / "foreign")
    before = own.file.read_bytes()
    with pytest.raises(Incompatible, match=r"(?s)vocabulary.*special id.*tensor .*--unshared") as caught:
        own.add(str(foreign))
    assert caught.value.exit_code == 3
    assert own.file.read_bytes() == before
    assert own.add(str(foreign), unshared=True).admitted == "unshared"
    with pytest.raises(InputError, match="--unshared"):
        own.promote("latest", "foreign")


def test_a_draft_that_comes_later_says_whom_it_does_not_fit(tmp_path: Path, family: Path) -> None:
    registry = Registry(tmp_path / "registry")
    registry.add(str(save_target(tmp_path / "foreign")))
    misfits = registry.add_draft(family / "bundle")
    assert [version.partition("@")[0] for version in misfits] == ["foreign"]
    assert registry.read().drafts == [str(family / "bundle")]
    with pytest.raises(BundleMissing):
        registry.add_draft(tmp_path)


def test_versions_are_found_by_name_in_the_roots(own: Registry, tmp_path: Path, family: Path) -> None:
    shutil.copytree(family / "target-v2", own.path / "target-v2")
    shutil.copytree(family / "target-v1", own.path / "target-v1")
    inside = own.add("target-v2", only_roots=True)
    assert inside.path == "target-v2"
    # The registry can be moved, and what is inside is found again.
    moved = Registry(own.path.rename(tmp_path / "elsewhere"))
    assert moved.path_of(moved.read().entry(inside.version)) == tmp_path / "elsewhere" / "target-v2"
    for source in ("../target-v2", str(family / "target-v3"), "target-v3", "", ".", ".."):
        with pytest.raises(InputError, match="there is no version"):
            moved.add(source, only_roots=True)
    moved.change(lambda roster: msgspec.structs.replace(roster, roots=[".", str(family)]))
    assert moved.add("target-v3", only_roots=True).path == str(family / "target-v3")


def test_a_version_that_is_cut_short_does_not_come_in(own: Registry, tmp_path: Path, family: Path) -> None:
    copy = shutil.copytree(family / "target-v1", tmp_path / "copy")
    shard = copy / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(TargetError, match=r"cut short.*copy the model again"):
        own.add(str(copy))
    shard.unlink()
    with pytest.raises(TargetError, match="lacks model-00002"):
        own.add(str(copy))
    with pytest.raises(InputError, match="there is no version"):
        own.add(str(tmp_path / "missing"))


def test_what_is_added_again_is_there_once_and_active(own: Registry, family: Path) -> None:
    first = own.add(str(family / "target-v2"))
    assert own.retire("target-v2").retired
    assert own.listing(own.read())[0].state == "retired"
    again = own.add(str(family / "target-v2"))
    assert (again.version, again.retired) == (first.version, None)
    assert len(own.read().targets) == 2
    with pytest.raises(Unknown):
        own.retire("target-v7")
