"""Boots an image in an emulated board, and uses it as its owner would: `make boot-test`.

    python -m tests.device_profiles.image.boot_test build/flexspec-generic-arm64.img --model small

The board configures itself from flexspec.toml, answers through a verifier on this machine exactly as transformers'
`generate`, is restarted by its watchdog, measures a slower link, takes a signed update and returns from it, refuses one
that its maker has not signed, undoes one that cannot start, and boots a second time. Emulation is slow: times are
printed, not judged.

    python -m tests.device_profiles.image.boot_test build/flexspec-generic-arm64.img --count-instructions

measures the first boot alone, by a clock that a busy machine does not slow down, and says what as many instructions and
as many bytes of the card would take on a board of this kind: a model, of one core and without overlap.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from device_profiles.image.archives import new_archive
from device_profiles.image.boot_partition import ImagePartition
from device_profiles.image.release import pack_update, read_key
from device_profiles.image.runtime import CHECKOUT, FIRST_SLOT, PYTHON_VERSION, add_environment, build_wheel
from export.bundle.sign import generate_key_pair
from tests.device_profiles.image.guest import (
    HOST_ADDRESS,
    LARGE_BOARD,
    SMALL_BOARD,
    Guest,
    free_port,
    keep_log,
    make_card,
)

FAMILY = CHECKOUT / "tests/toy_family"
PROMPT, TOKENS = "def read_configuration(path", 32
SERVICE, API_KEY = "flexspec-edge", "key-of-the-board"
CONFIGURATION = """\
[board]
hostname = "boot-test"
[secrets]
api_key = "{key}"
[verifier]
urls = ["{url}"]
insecure = true
[service]
host = "0.0.0.0"
"""
UPDATE_VERSION, BROKEN_VERSION = "9.9.8", "9.9.9"
# Of the idle service: what a Zero 2 W, with 512 MB, has room for beside everything else.
MAX_IDLE_MB = 120
LOG = CHECKOUT / "build/boot-test.log"


def main() -> int:
    """Run the test. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("--model", choices=("small", "large"), default="small")
    text = "only boot, with a clock that counts instructions: the time to readiness on a processor of 1000 MIPS"
    parser.add_argument("--count-instructions", action="store_true", help=text)
    options = parser.parse_args()
    model = {"small": SMALL_BOARD, "large": LARGE_BOARD}[options.model]
    # So that an emulator, and the log, are taken care of when this is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    expected = reference()
    with tempfile.TemporaryDirectory(prefix="boot-test-", dir=options.image.parent) as name, verifier() as port:
        text = CONFIGURATION.format(url=f"http://{HOST_ADDRESS}:{port}", key=API_KEY)
        counting: bool = options.count_instructions
        guest = make_card(options.image, text, Path(name), model, counts_instructions=counting)
        try:
            if counting:
                with guest.booted():
                    check_first_boot(guest)
                return 0
            with guest.booted():
                check_first_boot(guest)
                check_answer(guest, expected)
                check_watchdog(guest)
                check_answer(guest, expected)
                check_link(guest)
                check_updates(guest, Path(name), expected)
                check_answer(guest, expected)
            check_boot_partition(guest)
            with guest.booted():
                wait_until_ready(guest)
                check_health(guest)
                check_answer(guest, expected)
        finally:
            keep_log(guest, LOG)
    print(f"boot test passed: {model.cpu}, {model.memory_mb} MB", flush=True)
    return 0


def check_first_boot(guest: Guest) -> None:
    started = time.monotonic()
    wait_until_ready(guest)
    report("ready after", f"{time.monotonic() - started:.0f} s on this machine")
    activated = int(guest.property(SERVICE, "ActiveEnterTimestampMonotonic")) / 1e6
    cost = f"the emulator has used {guest.processor_seconds():.0f} s of processor time"
    report("ready at", f"{activated:.1f} s of the guest's uptime; {cost}")
    if guest.counts_instructions:
        report_model(guest, activated)
    process = guest.property(SERVICE, "MainPID")
    lines = guest.run(f"grep -E '^Vm(RSS|Swap):' /proc/{process}/status").splitlines()
    megabytes = sum(int(line.split()[1]) for line in lines) / 1e3
    report("memory of the idle service", f"{megabytes:.0f} MB")
    assert megabytes < MAX_IDLE_MB
    # Without memory cgroups, the unit's limit is none: the service limits itself, and its status says so.
    status = guest.run("edge-runtime service status")
    limit = guest.run(f"grep 'Max data size' /proc/{process}/limits").split()[3]
    assert ("does not account for memory" in status) is (limit != "unlimited") is guest.lacks_memory_cgroups, status
    assert "credential" not in guest.run("journalctl", "--unit", SERVICE).lower()
    report("page size", guest.run("getconf", "PAGESIZE"))
    assert guest.run("hostname") == "boot-test"
    root_kilobytes = int(guest.run("df", "--output=size", "/").splitlines()[1])
    assert root_kilobytes * 1024 > guest.card.stat().st_size - (400 << 20), "the root file system did not grow"
    check_health(guest)


def report_model(guest: Guest, activated: float) -> None:
    """Print what the boot until `activated` takes on a real board, by a guest whose clock counts instructions."""
    board = guest.model.board
    service = int(guest.property(SERVICE, "CPUUsageNSec")) / 1e9
    sectors = int(guest.run("cat /sys/block/vda/stat").split()[2])
    read = sectors * 512 / 1e6
    # The clock goes on while all processors are idle: these are fewer instructions, if anything.
    report(
        "instructions until readiness", f"at most {activated:.1f} billion, {service:.1f} billion of them the service's"
    )
    seconds = activated * 1e3 / board.mips + read / board.card_mb_per_second
    assumed = f"{board.mips} million instructions a second of one core, {board.card_mb_per_second} MB/s of its card"
    report("modeled readiness", f"{seconds:.0f} s of uptime on a {board.title}: {assumed}, {read:.0f} MB read")


def check_health(guest: Guest) -> None:
    guest.wait_for(
        "the boot ends", lambda: guest.run("systemctl", "is-system-running", check=False) not in ("starting", "")
    )
    failed = guest.run("systemctl", "--failed", "--plain", "--no-legend", check=False)
    assert failed == "", failed
    assert guest.run("findmnt", "--noheadings", "--output=OPTIONS", "/").startswith("rw")


def check_answer(guest: Guest, expected: str) -> None:
    request = {"model": "", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    headers = {"authorization": f"Bearer {API_KEY}"}
    answer = httpx.post(f"{guest.url}/v1/completions", json=request, headers=headers, timeout=600).json()
    assert "choices" in answer, answer
    assert answer["choices"][0]["text"] == expected, (answer, expected)
    assert httpx.post(f"{guest.url}/v1/completions", json=request, timeout=60).status_code == 401
    report("answer", "exact")


def check_watchdog(guest: Guest) -> None:
    """A service that hangs is restarted."""
    guest.run("systemctl", "kill", "--signal=STOP", SERVICE)
    guest.wait_for("the watchdog restarts the service", lambda: guest.property(SERVICE, "NRestarts") == "1")
    wait_until_ready(guest)
    report("watchdog", "restarted the service")


def check_link(guest: Guest) -> None:
    """The link's probe sees a change of the link."""
    device = json.loads(guest.run("ip", "-json", "route", "show", "default"))[0]["dev"]
    before = round_trip(guest)
    guest.run("tc", "qdisc", "add", "dev", device, "root", "netem", "delay", "300ms")
    request = {"model": "", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    headers = {"authorization": f"Bearer {API_KEY}"}

    def sees_delay() -> bool:
        httpx.post(f"{guest.url}/v1/completions", json=request, headers=headers, timeout=600).raise_for_status()
        return round_trip(guest) > before + 0.15

    guest.wait_for("the round trip time follows the link", sees_delay)
    report("round trip", f"{before * 1e3:.0f} ms, with a delay of 300 ms {round_trip(guest) * 1e3:.0f} ms")
    guest.run("tc", "qdisc", "del", "dev", device, "root")


def check_updates(guest: Guest, directory: Path, expected: str) -> None:
    """An update of the maker's is used, and can be undone; another's is refused; one that cannot start is undone."""
    private = directory / "maker.key"
    guest.copy(generate_key_pair(private), "/root/maker.pub")
    key = read_key(private)
    install = "edge-runtime update install --key /root/maker.pub /root/flexspec.update"
    image = ("flexspec.a", "as in the image")

    guest.copy(make_update(directory, UPDATE_VERSION, None, complete=True), "/root/flexspec.update")
    output = guest.run(install, check=False)
    assert "nothing was changed" in output, output
    assert update_status(guest) == (*image, None)

    guest.copy(make_update(directory, UPDATE_VERSION, key, complete=True), "/root/flexspec.update")
    assert f"version {UPDATE_VERSION} is in use" in guest.run(install)
    assert update_status(guest) == ("flexspec.b", UPDATE_VERSION, image[1])
    wait_until_ready(guest)
    check_answer(guest, expected)
    guest.run("edge-runtime update rollback")
    assert update_status(guest) == (*image, UPDATE_VERSION)
    wait_until_ready(guest)
    report("signed update", "used, and undone")

    guest.copy(make_update(directory, BROKEN_VERSION, key, complete=False), "/root/flexspec.update")
    output = guest.run(install, check=False)
    assert f"version {BROKEN_VERSION} did not become ready" in output, output
    assert "is in use again" in output, output
    assert update_status(guest) == (*image, None)
    wait_until_ready(guest)
    report("broken update", "fell back")

    # What a power cut during its trial leaves: nothing of it runs, and it is in use.
    guest.run("mkdir /opt/flexspec.b && ln -sfn flexspec.b /opt/flexspec && printf flexspec.a >/opt/flexspec.update")
    guest.run("systemctl restart flexspec-configure", check=False)
    assert update_status(guest) == (*image, None)
    assert "an update of FlexSpec was interrupted" in guest.run("cat /boot/firmware/flexspec-errors.txt")
    guest.run("systemctl restart flexspec-configure")
    report("interrupted update", "undone")


def update_status(guest: Guest) -> tuple[str, str, str | None]:
    """Return the slot in use, its version and that of the other slot; no update is on trial."""
    status = json.loads(guest.run("edge-runtime update status --json"))
    assert not status["on_trial"], status
    return status["active"], status["version"], status["other"]


def make_update(directory: Path, version: str, key: Ed25519PrivateKey | None, *, complete: bool) -> Path:
    """Make an update with the program of this checkout.

    Args:
        complete: with the packages that it depends on, which are those of the image; else it cannot start, as if its
            wheels had been forgotten.
    """
    packages = directory / "packages"
    shutil.rmtree(packages, ignore_errors=True)
    with zipfile.ZipFile(build_wheel(directory, 0)) as content:
        content.extractall(packages)
    if complete:
        (packages / "image.pth").write_text(f"{FIRST_SLOT}/lib/python{PYTHON_VERSION}/site-packages\n")
    with new_archive(directory / "runtime.tar", 0) as archive:
        add_environment(archive, packages)
    return pack_update(directory / "runtime.tar", version, directory / "flexspec.update", key, 0)


def check_boot_partition(guest: Guest) -> None:
    text = (ImagePartition(guest.card).read("flexspec.toml") or b"").decode()
    assert API_KEY not in text
    assert 'hostname = "boot-test"' in text
    assert ImagePartition(guest.card).read("flexspec-errors.txt") is None


def round_trip(guest: Guest) -> float:
    """Return the round trip time to the verifier that the board measured last, in seconds."""
    headers = {"authorization": f"Bearer {API_KEY}"}
    metrics = httpx.get(f"{guest.url}/metrics", headers=headers, timeout=60).text
    for line in metrics.splitlines():
        if line.startswith("flexspec_link_rtt_seconds "):
            return float(line.split()[1])
    raise AssertionError("the metrics have no round trip time")


def wait_until_ready(guest: Guest) -> None:
    guest.wait_for("the service is ready", lambda: httpx.get(f"{guest.url}/readyz", timeout=20).status_code == 200)
    guest.wait_for("SSH answers", lambda: guest.run("true") == "")


def report(what: str, value: str) -> None:
    print(f"{what}: {value}", flush=True)


@contextlib.contextmanager
def verifier(port: int = 0, host: str = HOST_ADDRESS) -> Iterator[int]:
    """Serve target-v1 of the toy family on this machine, of which guests know the name `host`. Yields the port."""
    port = port or free_port()
    command = [sys.executable, "-m", "cloud_verifier.cli", "serve", str(FAMILY / "target-v1"), "--port", str(port)]
    command += ["--allowed-hosts", host]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 300
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    break
            assert process.poll() is None, "the verifier ended"
            assert time.monotonic() < deadline, "the verifier did not become ready"
            time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        process.wait()


def reference() -> str:
    """Return what transformers' own `generate` answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FAMILY / "target-v1")
    model = AutoModelForCausalLM.from_pretrained(FAMILY / "target-v1", dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0]
    whole, start = (tokenizer.decode(part, skip_special_tokens=True) for part in (output, ids[0]))
    return str(whole)[len(start) :]


if __name__ == "__main__":
    raise SystemExit(main())
