"""Bundles that must be signed, and the commands that sign them."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edge_runtime.bundles.signatures import SIGNATURE, BundleUntrusted, read_public_keys
from edge_runtime.bundles.store import BundleStore, configured_bundle, current_bundle
from edge_runtime.protocol.bundle import MANIFEST_NAME
from edge_runtime.protocol.errors import BundleCorrupt, BundleError, InputError
from edge_runtime.settings.table import DraftSettings
from export.bundle.sign import generate_key_pair, sign_bundle
from export.cli.main import main as export
from tests.edge_runtime.bundles.bundle_files import assert_whole, change, run, spoil


@pytest.mark.slow
def test_with_a_key_only_what_it_signed_is_installed_and_used(
    tmp_path: Path, another: Path, keys: Path, shipped: Path
) -> None:
    store = BundleStore(tmp_path / "store", keys / "maker.pub")
    with pytest.raises(BundleUntrusted, match=rf"{another} is not signed: it has no {SIGNATURE}"):
        store.install(another)
    sign_bundle(another, keys / "other.key")
    with pytest.raises(BundleUntrusted, match="by a configured key"):
        store.install(another)
    sign_bundle(another, keys / "maker.key")
    name = store.install(another).name
    assert [entry.signature for entry in store.entries()] == ["valid"]
    assert [entry.signature for entry in BundleStore(store.path).entries()] == ["unchecked"]
    assert current_bundle(store).path.name == name
    draft = DraftSettings(bundle=another, public_key_file=keys / "maker.pub")
    assert configured_bundle(draft).manifest.name == "another"
    with pytest.raises(BundleUntrusted):
        configured_bundle(msgspec.structs.replace(draft, bundle=shipped))
    # Whoever changes a file must change its hash in the manifest, and that is signed.
    change(another, acceptance={})
    with pytest.raises(BundleUntrusted, match="the bundle was modified"):
        store.install(another)
    with pytest.raises(BundleUntrusted):
        configured_bundle(draft)
    spoil(store.path / name / SIGNATURE)
    assert [(entry.signature, entry.problem) for entry in store.entries()] == [
        ("wrong", "not signed by a configured key")
    ]
    with pytest.raises(BundleError, match="not the signature of this manifest"):
        current_bundle(store)
    sign_bundle(change(another, acceptance={}), keys / "maker.key")
    assert store.install(another)
    assert_whole(store)


def test_an_unsigned_bundle_already_installed_is_refused_once_a_key_is_configured(
    store: BundleStore, shipped: Path, keys: Path
) -> None:
    store.install(shipped)
    with pytest.raises(BundleError, match="is not signed"):
        current_bundle(BundleStore(store.path, keys / "maker.pub"))


@pytest.mark.slow
def test_a_file_of_keys_may_hold_the_next_one_too(tmp_path: Path, another: Path, keys: Path) -> None:
    both = tmp_path / "both.pub"
    both.write_bytes((keys / "maker.pub").read_bytes() + (keys / "other.pub").read_bytes())
    assert len(read_public_keys(both)) == 2
    sign_bundle(another, keys / "other.key")
    BundleStore(tmp_path / "store", both).check(another)


def test_keys_that_are_none_are_refused(tmp_path: Path, another: Path, keys: Path) -> None:
    public = generate_private_key(65537, 1024).public_key()
    rsa = tmp_path / "rsa.pub"
    rsa.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    for path in (keys / "maker.key", rsa, tmp_path / "gone", another / MANIFEST_NAME):
        with pytest.raises(InputError):
            read_public_keys(path)
    for path in (keys / "maker.pub", tmp_path / "gone", another / MANIFEST_NAME):
        with pytest.raises(InputError):
            sign_bundle(another, path)
    with pytest.raises(InputError, match="exists"):
        generate_key_pair(keys / "maker.key")
    assert stat.S_IMODE((keys / "maker.key").stat().st_mode) == 0o600
    spoil(another / "tokenizer.json")
    with pytest.raises(BundleCorrupt):
        sign_bundle(another, keys / "maker.key")


@pytest.mark.slow
def test_keys_and_signatures_by_command(another: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    public, secret = tmp_path / "me.pub", tmp_path / "me.key"
    assert export(["keygen", "--output", str(tmp_path / "me")]) == 0
    assert capsys.readouterr().out.startswith(f"{secret}: keep it secret; {public}: for boards")
    assert export(["sign", str(another), "--key", str(secret)]) == 0
    assert capsys.readouterr().out == f"{another / SIGNATURE}: signed\n"
    assert run("verify", f"{another}/", "--key", str(public)).returncode == 0
    assert export(["keygen", "--output", str(tmp_path / "me")]) == 2
    assert "choose another name" in capsys.readouterr().err
    # The keys and the signature are what everybody's tools take for them.
    check = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(public), "-rawin"]
    files = ["-in", str(another / MANIFEST_NAME), "-sigfile", str(another / SIGNATURE)]
    assert subprocess.run([*check, *files], capture_output=True, check=False).returncode == 0
