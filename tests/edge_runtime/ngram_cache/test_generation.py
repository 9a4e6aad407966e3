"""The n-gram cache of a service in its own process: it survives restarts, and can be erased and switched off."""

from __future__ import annotations

import json
import re
import stat
import time
import urllib.request
from pathlib import Path

import pytest

from cloud_verifier.model.target import Target
from edge_runtime.cli.main import main
from edge_runtime.ngram_cache.store import NgramStore
from tests.cloud_verifier.protocol_client import running
from tests.edge_runtime.service.conftest import board_process

pytestmark = pytest.mark.usefixtures("toy_bundle")

SECRET = "def a_secret_that_is_remembered(password):\n"


def ask(url: str) -> str:
    body = json.dumps({"prompt": SECRET, "max_tokens": 24, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return str(json.load(response)["choices"][0]["text"])


def cached_tokens(url: str) -> int | None:
    """Tokens in the n-gram cache, from the board's metrics; None without a cache."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=300) as response:
        found = re.search(r"^flexspec_memory_tokens (\S+)$", response.read().decode(), re.MULTILINE)
    return int(float(found[1])) if found else None


@pytest.mark.slow
def test_the_cache_survives_a_restart_until_it_is_erased(
    target_v1: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    options = ("--policy", "fixed", "--threads", "1")
    enabled = tmp_path / "enabled.toml"
    enabled.write_text("[draft]\nngram_cache = true\n")
    with running(target_v1) as verifier:
        with board_process(verifier, *options, "--config", str(enabled)) as (process, url):
            assert cached_tokens(url) == 0
            texts = [ask(url)]
            # A text that is being stored at shutdown is still written.
            process.terminate()
            process.wait(30)
        (file,) = (tmp_path / "state" / "memory").glob("*.jsonl")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        (record,) = NgramStore(file.parent, file.stem).read()
        assert record.version.startswith("target-v1@")
        with board_process(verifier, *options, "--config", str(enabled)) as (_, url):
            assert cached_tokens(url) == len(record.ids) + 1
            texts.append(ask(url))
        assert main(["ngram-cache", "show"]) == 0
        shown = capsys.readouterr().out
        assert record.version in shown
        assert "password" not in shown
        assert main(["ngram-cache", "erase"]) == 0
        config = tmp_path / "config.toml"
        config.write_text("[draft]\nngram_cache = false\nngram_cache_directory = 'kept'\n")
        for disabled in ((), ("--no-ngram-cache", "--config", str(enabled)), ("--config", str(config))):
            with board_process(verifier, *options, *disabled) as (_, url):
                assert cached_tokens(url) is None
                texts.append(ask(url))
        assert not list(file.parent.glob("*.jsonl"))
        # The configured directory applies to `generate` as well.
        config.write_text("[draft]\nngram_cache_directory = 'kept'\n")
        command = ["generate", SECRET, "--verifier", verifier, "--max-new-tokens", "24", "--policy", "fixed", "--quiet"]
        assert main([*command, "--config", str(config)]) == 0
        # This process goes on, and the draft thread stores the text some time later.
        deadline = time.monotonic() + 300
        while not list((tmp_path / "kept").glob("*.jsonl")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        texts.append(capsys.readouterr().out.split("erased\n")[-1].removesuffix("\n"))
        assert main(command) == 0
        assert not list(file.parent.glob("*.jsonl"))
    assert len({text.rstrip("\n") for text in texts}) == 1
