"""The registry on disk: edited by hand, by several processes at once, and on a full disk; and admission of versions."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from cloud_verifier.registry.catalog import Catalog, TargetVersion, TrafficSplit, UnknownVersion, VersionAlias
from cloud_verifier.registry.compatibility import IncompatibleVersion
from cloud_verifier.registry.registry import FILE_HEADING, REGISTRY_FILE, Registry, RegistryError
from edge_runtime.protocol.errors import BundleMissing, InputError, TargetError
from tests.models import save_target

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
MOMENTS = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))
PATHS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30)

ADD_TWENTY_VERSIONS = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from cloud_verifier.registry.catalog import TargetVersion
from cloud_verifier.registry.registry import Registry
registry = Registry(Path(sys.argv[1]))
for index in range(20):
    target = TargetVersion(f"{sys.argv[2]}-{index}@{'a' * 12}", "x", "adapter", "shared", datetime.now(UTC))
    registry.update(lambda catalog: catalog.add(target))
"""
PROMOTE_ON_A_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from cloud_verifier.registry.registry import Registry, RegistryError
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
def catalogs(draw: st.DrawFn) -> Catalog:
    names = draw(st.lists(NAMES, min_size=1, max_size=5, unique=True))
    targets = [
        TargetVersion(
            f"{name}@{draw(st.from_regex('[0-9a-f]{12}', fullmatch=True))}",
            draw(PATHS),
            draw(st.sampled_from(["checkpoint", "adapter", "changes"])),
            draw(st.sampled_from(["shared", "unshared"])),
            draw(MOMENTS),
        )
        for name in names
    ]
    versions = st.sampled_from([target.version for target in targets])

    def draw_split() -> TrafficSplit:
        canary = draw(st.dictionaries(versions, st.floats(0.1, 20), max_size=3))
        return TrafficSplit(draw(versions), draw(MOMENTS), canary)

    aliases = draw(st.lists(NAMES.filter(lambda name: name not in names), max_size=3, unique=True))
    return Catalog(
        default=draw(NAMES),
        roots=draw(st.lists(PATHS, max_size=2)),
        drafts=draw(st.lists(PATHS, max_size=2)),
        targets=targets,
        aliases={
            name: VersionAlias(draw_split(), [draw_split() for _ in range(draw(st.integers(0, 3)))]) for name in aliases
        },
    )


def make_registry(path: Path, *names: str) -> Registry:
    """A registry that lists adapters of these names, without files."""
    registry = Registry(path)
    for name in names:
        target = TargetVersion(f"{name}@{'a' * 12}", name, "adapter", "shared", datetime.now(UTC))
        registry.update(functools.partial(Catalog.add, target=target))
    return registry


@pytest.mark.slow
@settings(max_examples=60)
@given(catalog=catalogs())
def test_catalogs_survive_a_round_trip(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> None:
    registry = Registry(tmp_path_factory.mktemp("registry"))
    assert registry.update(lambda _: catalog) == registry.read() == catalog


def test_the_file_is_readable_and_may_be_edited(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, "v0", "v1")
    registry.canary("latest", "v1", 5)
    text = registry.file.read_text()
    assert text.startswith(FILE_HEADING)
    assert '[aliases.latest.now.canary]\n"v1@aaaaaaaaaaaa" = 5.0' in text
    registry.file.write_text(text.replace("= 5.0", "= 50").replace("\n\n", "\n# a comment\n\n"))
    assert registry.read().aliases["latest"].now.canary == {f"v1@{'a' * 12}": 50.0}


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("format_version = 1", "format_version = 2", "upgrade"),
        ("format_version = 1", "", "format None"),
        ('kind = "adapter"', 'kind = "apple"', "kind"),
        ('[[targets]]\nversion = "v0', '[[targets]]\nversion = "v7', "not among the targets"),
        ("aaaaaaaaaaaa", "beef", "not a valid version"),
        ('[aliases.latest.now]\nversion = "v0', '[aliases.latest.now]\nversion = "v9', "not among the targets"),
        ("[aliases.latest", "[aliases.v1", "cannot be an alias"),
        ("default", "defautl", "unknown field"),
        ("= 5.0", "= 500", "100"),
        ("= 5.0", "= [5", "is invalid"),
        ('path = "v1"', 'path = "v1"\nretired = 2026-01-01T00:00:00Z', "which is retired"),
        ("[[targets]]", "\0", "is invalid"),
    ],
)
def test_an_invalid_edit_is_reported_and_never_overwritten(tmp_path: Path, old: str, new: str, why: str) -> None:
    registry = make_registry(tmp_path, "v0", "v1")
    registry.canary("latest", "v1", 5)
    text = registry.file.read_text()
    assert old in text
    registry.file.write_text(text.replace(old, new))
    for attempt in (registry.read, lambda: registry.promote("latest", "v1")):
        with pytest.raises(RegistryError, match=why) as caught:
            attempt()
        assert str(registry.file) in str(caught.value)
    assert registry.file.read_text() == text.replace(old, new)


def test_a_missing_or_binary_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="targets add"):
        Registry(tmp_path / "nothing").read()
    assert not (tmp_path / "nothing").exists()
    (tmp_path / REGISTRY_FILE).write_bytes(b"\xff\xfe" * 100)
    with pytest.raises(RegistryError, match="is invalid"):
        Registry(tmp_path).read()
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match="cannot"):
        make_registry(tmp_path / "file", "v0")


def test_a_refused_change_changes_nothing(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, "v0", "v1")
    before, stamp = registry.file.read_bytes(), registry.file_stamp()
    for attempt in (
        lambda: registry.promote("latest", "v7"),
        lambda: registry.canary("latest", "v1", 101),
        lambda: registry.rollback("latest"),
        lambda: registry.retire("v0"),
    ):
        with pytest.raises(InputError):
            attempt()
    assert (registry.file.read_bytes(), registry.file_stamp()) == (before, stamp)
    registry.promote("latest", "v1")
    assert registry.file_stamp() != stamp


@pytest.mark.slow
def test_concurrent_processes_lose_no_change(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", ADD_TWENTY_VERSIONS, str(tmp_path), name]) for name in ("a", "b", "c")
    ]
    while any(process.poll() is None for process in processes):
        if (tmp_path / REGISTRY_FILE).exists():
            Registry(tmp_path).read()  # Raises if the file were ever incomplete.
    assert [process.returncode for process in processes] == [0, 0, 0]
    catalog = Registry(tmp_path).read()
    assert {target.name for target in catalog.targets} == {f"{name}-{i}" for name in "abc" for i in range(20)}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", REGISTRY_FILE]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, "v0", "v1")
    before = registry.file.read_bytes()
    assert len(before) > 300
    finished = subprocess.run(
        [sys.executable, "-c", PROMOTE_ON_A_FULL_DISK, str(tmp_path)], capture_output=True, text=True
    )
    assert finished.returncode == 3, finished.stderr
    assert "nothing was changed" in finished.stdout
    assert registry.file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", REGISTRY_FILE]
    registry.promote("stable", "v0")


@pytest.fixture
def family_registry(tmp_path: Path, family: Path) -> Registry:
    """A registry with the family's draft and target v1."""
    registry = Registry(tmp_path / "registry")
    registry.add_draft(family / "bundle")
    registry.add(str(family / "target-v1"))
    return registry


def test_versions_that_kept_the_shared_tensors_are_admitted(family_registry: Registry, family: Path) -> None:
    added = [family_registry.add(str(family / name)) for name in ("target-v2", "target-v3", "target-v4")]
    assert [(target.name, target.kind, target.admitted) for target in added] == [
        ("target-v2", "adapter", "shared"),
        ("target-v3", "adapter", "shared"),
        ("target-v4", "changes", "shared"),
    ]
    listed = {version.version: version for version in family_registry.list_versions(family_registry.read())}
    assert len(listed) == 4
    assert all(version.state == "active" and not version.problem for version in listed.values())
    assert family_registry.locate(str(family / "target-v2"), family_registry.read()) == family_registry.path_of(
        added[0]
    )


def test_an_incompatible_version_is_refused_unless_unshared_is_given(family_registry: Registry, tmp_path: Path) -> None:
    foreign = save_target(tmp_path / "foreign")
    before = family_registry.file.read_bytes()
    with pytest.raises(IncompatibleVersion, match=r"(?s)vocabulary.*special id.*tensor .*--unshared") as caught:
        family_registry.add(str(foreign))
    assert caught.value.exit_code == 3
    assert family_registry.file.read_bytes() == before
    assert family_registry.add(str(foreign), unshared=True).admitted == "unshared"
    with pytest.raises(InputError, match="--unshared"):
        family_registry.promote("latest", "foreign")


def test_adding_a_draft_reports_the_served_versions_it_does_not_fit(tmp_path: Path, family: Path) -> None:
    registry = Registry(tmp_path / "registry")
    registry.add(str(save_target(tmp_path / "foreign")))
    misfits = registry.add_draft(family / "bundle")
    assert [version.partition("@")[0] for version in misfits] == ["foreign"]
    assert registry.read().drafts == [str(family / "bundle")]
    with pytest.raises(BundleMissing):
        registry.add_draft(tmp_path)


def test_versions_are_found_by_name_in_the_roots(family_registry: Registry, tmp_path: Path, family: Path) -> None:
    shutil.copytree(family / "target-v2", family_registry.path / "target-v2")
    shutil.copytree(family / "target-v1", family_registry.path / "target-v1")
    inside = family_registry.add("target-v2", only_roots=True)
    assert inside.path == "target-v2"
    # Versions inside the registry are found after it is moved.
    moved = Registry(family_registry.path.rename(tmp_path / "elsewhere"))
    assert moved.path_of(moved.read().find_exact(inside.version)) == tmp_path / "elsewhere" / "target-v2"
    for source in ("../target-v2", str(family / "target-v3"), "target-v3", "", ".", ".."):
        with pytest.raises(InputError, match="there is no version"):
            moved.add(source, only_roots=True)
    moved.update(lambda catalog: msgspec.structs.replace(catalog, roots=[".", str(family)]))
    assert moved.add("target-v3", only_roots=True).path == str(family / "target-v3")


def test_a_truncated_version_is_refused(family_registry: Registry, tmp_path: Path, family: Path) -> None:
    copy = shutil.copytree(family / "target-v1", tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(family / "target-v1").save_pretrained(copy, max_shard_size="2MB")
    shard = next(copy.glob("model-00002-of-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(TargetError, match=r"truncated.*copy the model again"):
        family_registry.add(str(copy))
    shard.unlink()
    with pytest.raises(TargetError, match="lacks model-00002"):
        family_registry.add(str(copy))
    with pytest.raises(InputError, match="there is no version"):
        family_registry.add(str(tmp_path / "missing"))


def test_a_version_added_again_is_listed_once_and_active(family_registry: Registry, family: Path) -> None:
    first = family_registry.add(str(family / "target-v2"))
    assert family_registry.retire("target-v2").retired
    assert family_registry.list_versions(family_registry.read())[0].state == "retired"
    readded = family_registry.add(str(family / "target-v2"))
    assert (readded.version, readded.retired) == (first.version, None)
    assert len(family_registry.read().targets) == 2
    with pytest.raises(UnknownVersion):
        family_registry.retire("target-v7")
