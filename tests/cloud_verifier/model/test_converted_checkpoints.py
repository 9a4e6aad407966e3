"""The cache of converted checkpoints. What is converted is tested in `test_gguf`."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cloud_verifier.model.converted_checkpoints import CONVERTER_VERSION, cache_directory
from edge_runtime.protocol.errors import TargetError

PROGRAM = """
import sys
from pathlib import Path
from cloud_verifier.model.converted_checkpoints import resolve_checkpoint
print(resolve_checkpoint(Path(sys.argv[1])), "torch" in sys.modules)
"""


def test_the_cache_follows_the_standard() -> None:
    assert cache_directory({"XDG_CACHE_HOME": "/cache", "HOME": "/home/me"}) == Path("/cache/flexspec/gguf")
    assert cache_directory({"XDG_CACHE_HOME": "relative", "HOME": "/home/me"}) == Path("/home/me/.cache/flexspec/gguf")
    assert cache_directory({"CACHE_DIRECTORY": "/var/cache/verifier", "HOME": "/"}) == Path("/var/cache/verifier/gguf")
    with pytest.raises(TargetError, match="XDG_CACHE_HOME"):
        cache_directory({})


def test_a_converted_file_is_found_without_pytorch(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and so on")
    name = f"model-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}-{CONVERTER_VERSION}"
    directory = tmp_path / "cache" / "flexspec" / "gguf" / name
    directory.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name != "CACHE_DIRECTORY"}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    done = subprocess.run([sys.executable, "-c", PROGRAM, path], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(directory), "False"], done.stderr
