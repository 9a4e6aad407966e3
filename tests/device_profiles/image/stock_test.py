"""Boots a system like a stock Raspberry Pi OS in an emulated board: part of `make boot-test`.

    python -m tests.device_profiles.image.stock_test customised   # `device-profile image customise`, then a first boot
    python -m tests.device_profiles.image.stock_test readme       # the README's section for boards, word for word

Both end with an answer through a verifier on this machine, exactly as transformers' `generate`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from device_profiles.image.command import _default_cache
from device_profiles.image.customise import CustomiseOptions, customise
from device_profiles.image.programs import run
from device_profiles.image.release import make_release, read_key
from device_profiles.image.runtime import CHECKOUT
from export.bundle.sign import generate_key_pair
from tests.device_profiles.image.boot_test import (
    API_KEY,
    CONFIGURATION,
    FAMILY,
    LOG,
    PROMPT,
    TOKENS,
    check_answer,
    check_boot_partition,
    reference,
    report,
    verifier,
    wait_until_ready,
)
from tests.device_profiles.image.guest import (
    HOST_ADDRESS,
    LARGE_BOARD,
    README_NETWORK,
    Guest,
    ImagePartition,
    keep_log,
    make_key,
)
from tests.device_profiles.image.stock_image import build_stock_image

SECTION = re.compile(r"^## A board in .*?(?=^## )", re.MULTILINE | re.DOTALL)
# The address of the README's verifier.
README_HOST, README_PORT = "192.168.1.20", 8500
USER_DATA: dict[str, list[dict[str, Any]]] = {
    "users": [{"name": "pi", "shell": "/bin/bash", "sudo": "ALL=(ALL) NOPASSWD:ALL", "ssh_authorized_keys": []}],
}


def main() -> int:
    """Run the test. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=("customised", "readme"))
    parser.add_argument("--image", type=Path, help="stock image (default: build one)")
    options = parser.parse_args()
    # As in boot_test: an emulator does not outlive this.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    expected = reference()
    with tempfile.TemporaryDirectory(prefix="stock-test-", dir=LOG.parent) as name:
        directory = Path(name)
        card = directory / "card.img"
        if options.image:
            shutil.copyfile(options.image, card)
        else:
            build_stock_image(card, _default_cache(), print)
        {"customised": first_boot_of_customised, "readme": section_of_readme}[options.scenario](card, expected)
    print(f"{options.scenario}: passed", flush=True)
    return 0


def first_boot_of_customised(card: Path, expected: str) -> None:
    """A customised system installs, configures and starts the service at its first boot, without a network."""
    key = make_key(card.parent)
    public = key.with_suffix(".pub")
    with verifier() as port:
        text = CONFIGURATION.format(url=f"http://{HOST_ADDRESS}:{port}", key=API_KEY)
        configuration = card.parent / "flexspec.toml"
        configuration.write_text(f'{text}\n[ssh]\nkeys = ["{public.read_text().strip()}"]\n')
        options = CustomiseOptions(bundle=FAMILY / "bundle", configuration=configuration, ssh_keys=[public])
        list(customise(card, options, print))
        with booted(Guest(card, key, LARGE_BOARD)) as guest:
            wait_until_ready(guest)
            check_answer(guest, expected)
            assert "status: done" in guest.run("cloud-init", "status", "--wait", check=False)
            assert guest.run("hostname") == "boot-test"
            assert "sudo" in guest.run("id", "flexspec")
            assert guest.run("systemctl", "is-enabled", "flexspec-configure") == "enabled"
        check_boot_partition(guest)


def section_of_readme(card: Path, expected: str) -> None:
    """What the README says about a board works, word for word, from the files of a release."""
    install, ask = re.findall(r"^```\n(.*?)^```", section(), re.MULTILINE | re.DOTALL)
    key = make_key(card.parent)
    account = USER_DATA["users"][0] | {"ssh_authorized_keys": [key.with_suffix(".pub").read_text().strip()]}
    partition = ImagePartition(card)
    partition.write("user-data", f"#cloud-config\n{json.dumps({'users': [account]})}\n".encode())
    # With the small draft, whose target the verifier here has.
    public = generate_key_pair(card.parent / "maker.key")
    files = make_release(card.parent / "dist", FAMILY / "bundle", read_key(card.parent / "maker.key"), 0)
    check_signature(files, public)
    guest = Guest(card, key, LARGE_BOARD, user="pi", network=README_NETWORK)
    with verifier(README_PORT, README_HOST), booted(guest):
        guest.wait_for("SSH answers", lambda: guest.run("true") == "")
        guest.run("cloud-init", "status", "--wait", check=False)
        for path in files:
            guest.copy(path, path.name)
        report("README", guest.run("bash", "-e", "-o", "pipefail", content=script(card.parent, install)))
        answer = json.loads(guest.run("bash", "-e", content=script(card.parent, f"exec 2>/dev/null\n{ask}")))
        assert answer["choices"][0]["message"]["content"], answer
        body = json.dumps({"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0})
        command = f"curl -s http://127.0.0.1:8400/v1/completions -H 'content-type: application/json' -d '{body}'"
        answer = json.loads(guest.run("bash", "-e", content=script(card.parent, command)))
        assert answer["choices"][0]["text"] == expected, (answer, expected)


def check_signature(files: list[Path], public: Path) -> None:
    """OpenSSL, as CONTRIBUTING.md has it, accepts the signature of a release."""
    sums, signature = files[-2:]
    check = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", sums, "-sigfile", signature]
    assert "Signature Verified Successfully" in run(check).stdout
    report("signature of the release", "verified")


def section() -> str:
    """Return the README's section for boards."""
    match = SECTION.search((CHECKOUT / "README.md").read_text(encoding="utf-8"))
    assert match is not None, "the README has no section for boards"
    return match[0]


def script(directory: Path, text: str) -> IO[bytes]:
    """Return a file with commands, open for reading."""
    path = directory / "script"
    path.write_text(text)
    return path.open("rb")


@contextlib.contextmanager
def booted(guest: Guest) -> Iterator[Guest]:
    """Boot a guest; keep its serial console's log."""
    try:
        with guest.booted():
            yield guest
    finally:
        keep_log(guest, LOG)


if __name__ == "__main__":
    raise SystemExit(main())
