"""Boots an image in an emulated board, and uses it as its owner would: `make boot-test`.

    python -m tests.device_profiles.image.boot_test build/flexspec-generic-arm64.img --model small

The board configures itself from flexspec.toml, answers through a verifier on this machine exactly as transformers'
`generate`, is restarted by its watchdog, measures a slower link, returns from a broken update to the version that it
had, and boots a second time. Emulation is slow: times are printed, not judged.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx

from device_profiles.image.archives import new_archive
from device_profiles.image.boot_partition import ImagePartition
from device_profiles.image.release import pack_update
from device_profiles.image.runtime import CHECKOUT, FIRST_SLOT, PYTHON_VERSION, build_wheel
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
BROKEN_VERSION = "9.9.9"
LOG = CHECKOUT / "build/boot-test.log"


def main() -> int:
    """Run the test. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("--model", choices=("small", "large"), default="small")
    options = parser.parse_args()
    model = {"small": SMALL_BOARD, "large": LARGE_BOARD}[options.model]
    # So that an emulator, and the log, are taken care of when this is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    expected = reference()
    with tempfile.TemporaryDirectory(prefix="boot-test-", dir=options.image.parent) as name, verifier() as port:
        text = CONFIGURATION.format(url=f"http://{HOST_ADDRESS}:{port}", key=API_KEY)
        guest = make_card(options.image, text, Path(name), model)
        try:
            with guest.booted():
                check_first_boot(guest)
                check_answer(guest, expected)
                check_watchdog(guest)
                check_answer(guest, expected)
                check_link(guest)
                check_broken_update(guest, broken_update(Path(name)))
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
    process = guest.property(SERVICE, "MainPID")
    memory = guest.run("grep", "VmRSS", f"/proc/{process}/status").split()[1]
    report("memory of the idle service", f"{int(memory) / 1e3:.0f} MB")
    report("page size", guest.run("getconf", "PAGESIZE"))
    assert guest.run("hostname") == "boot-test"
    root_kilobytes = int(guest.run("df", "--output=size", "/").splitlines()[1])
    assert root_kilobytes * 1024 > guest.card.stat().st_size - (400 << 20), "the root file system did not grow"
    check_health(guest)


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


def check_broken_update(guest: Guest, update: Path) -> None:
    """An update that cannot start is undone by itself."""
    guest.copy(update, "/root/broken.update")
    output = guest.run("edge-runtime update install /root/broken.update", check=False)
    assert f"version {BROKEN_VERSION} did not become ready" in output, output
    assert "is in use again" in output, output
    status = json.loads(guest.run("edge-runtime update status --json"))
    assert (status["active"], status["version"], status["on_trial"]) == ("flexspec.a", "as in the image", False), status
    wait_until_ready(guest)
    report("broken update", "fell back")


def broken_update(directory: Path) -> Path:
    """Make an update that lacks every package that FlexSpec depends on, as if its wheels had been forgotten."""
    wheel = build_wheel(directory, 0)
    with new_archive(directory / "runtime.tar", 0) as archive, zipfile.ZipFile(wheel) as content:
        for name in sorted(content.namelist()):
            archive.file(f"{FIRST_SLOT[1:]}/lib/python{PYTHON_VERSION}/site-packages/{name}", content.read(name))
        archive.file(f"{FIRST_SLOT[1:]}/pyvenv.cfg", "home = /usr/bin\n")
        archive.link(f"{FIRST_SLOT[1:]}/bin/python", f"/usr/bin/python{PYTHON_VERSION}")
    return pack_update(directory / "runtime.tar", BROKEN_VERSION, directory / "broken.update", None, 0)


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
