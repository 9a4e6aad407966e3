"""Everything that only a GPU can show of the verifier, unattended: `python -m tests.benchmarks.gpu_session OUT`.

Runs the parts in order of their worth, each in a process of its own with a time limit, so that one that fails or hangs
costs only its own time. OUT gets a log of each, the tables as JSON lines (`tables.jsonl`) and `summary.json`. With
`--budget` no part begins that could end after it: name the others in `--parts` of another call.

On a machine without a network, give `--wheels` a directory of wheels of what it lacks, fetched elsewhere with
`pip download --no-deps --only-binary :all: --python-version 3.12 -d DIR` and the names that `--packages` prints.
`--dry-run` runs the same parts with tiny models on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

# By module: packages of the verifier, its tests and these benchmarks that a machine for PyTorch may lack.
PACKAGES = {
    "anyio": "anyio", "gguf": "gguf", "granian": "granian", "h2": "h2", "hpack": "hpack",
    "httpx": "httpx", "hyperframe": "hyperframe", "jinja2": "jinja2", "llguidance": "llguidance", "msgspec": "msgspec",
    "onnxruntime": "onnxruntime", "peft": "peft", "prometheus_client": "prometheus-client", "psutil": "psutil",
    "pytest": "pytest", "pytest_asyncio": "pytest-asyncio", "rich": "rich", "sniffio": "sniffio",
    "starlette": "starlette", "tenacity": "tenacity", "tomli_w": "tomli-w", "tomlkit": "tomlkit", "torchao": "torchao",
    "uvloop": "uvloop",
}  # fmt: skip
ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / "build" / "gpu-session"
VERIFIER = ("tests.benchmarks.verifier",)
SHAPE, SMALL = ("--shape", "7B", "--draft", "5"), ("--shape", "tiny", "--draft", "5", "--sessions", "1", "4")


class Part(NamedTuple):
    """One part of the session.

    Attributes:
        seconds: its limit.
        words: module and arguments.
        dry: those of the dry run.
        tables: whether it writes tables with `--json`.
    """

    seconds: int
    words: tuple[str, ...]
    dry: tuple[str, ...]
    tables: bool = True


CONFORMANCE = "tests.cloud_verifier.model.test_conformance"
HTTP = "tests.benchmarks.gpu_session"
PARTS = {
    "kernels": Part(100, ("tests.benchmarks.kernels",), (*VERIFIER, "--help"), tables=False),
    "texts": Part(
        150, (*VERIFIER, "texts", "--device", "cuda", "--tokens", "96"), (*VERIFIER, "texts", "--tokens", "8")
    ),
    "forwards": Part(170, (*VERIFIER, "forwards", "--compiled", *SHAPE), (*VERIFIER, "forwards", *SMALL)),
    "prefill": Part(
        150, (*VERIFIER, "prefill", "--compiled"), (*VERIFIER, "prefill", "--shape", "tiny", "--prompts", "300x2")
    ),
    "serving": Part(
        200,
        (*VERIFIER, "serving", "--compiled"),
        (*VERIFIER, "serving", *SMALL[:2], "--streams", "1", "2", "--tokens", "8", "--long-prompt", "200"),
    ),
    "conformance": Part(
        150,
        (CONFORMANCE, "llama", "qwen3", "gemma2", "mistral", "gpt_oss", "mixtral", "deepseek_v2", "--device", "cuda"),
        (CONFORMANCE, "llama"),
        tables=False,
    ),
    "http": Part(120, (HTTP, "--http", "cuda"), (HTTP, "--http", "cpu"), tables=False),
    # On a machine with two GPUs.
    "two-gpus": Part(150, (HTTP, "--http", "cuda", "--gpus", "2"), (HTTP, "--http", "cpu"), tables=False),
    "contexts": Part(
        150,
        (*VERIFIER, "forwards", "--compiled", "--shape", "8B", "--draft", "5", "--context", "512", "4096", "16384"),
        (*VERIFIER, "forwards", *SMALL, "--context", "32", "64"),
    ),
    "promotion": Part(
        100,
        (*VERIFIER, "promotion", "--compiled"),
        (*VERIFIER, "promotion", *SMALL[:2], "--adapters", "2", "--streams", "2", "--prompt", "40"),
    ),
    "cache": Part(
        120,
        (*VERIFIER, "forwards", "--compiled", "--exact", "--kv-cache-dtype", "fp8", *SHAPE),
        (*VERIFIER, "forwards", *SMALL),
    ),
    "fp8": Part(
        90,
        (*VERIFIER, "forwards", "--compiled", *SHAPE, "--quantize", "fp8"),
        (*VERIFIER, "forwards", *SMALL, "--quantize", "int8"),
    ),
    "capacity": Part(
        150,
        ("tests.benchmarks.gpu_capacity",),
        ("tests.benchmarks.gpu_capacity", "--shape", "tiny", "--boards", "2", "4", "--tokens", "16"),
    ),
    "peers": Part(
        400,
        ("tests.benchmarks.peers", "--shape", "7B", "--device", "cuda", "--dtype", "bfloat16", "--repeats", "1"),
        ("tests.benchmarks.peers", "--shape", "tiny", "--repeats", "1", "--tokens", "8", "--streams", "1", "2"),
        tables=False,
    ),
    "eager": Part(90, (*VERIFIER, "forwards", *SHAPE), (*VERIFIER, "forwards", *SMALL)),
    "static": Part(
        200, (*VERIFIER, "forwards", "--compiled", "--static", *SHAPE), (*VERIFIER, "forwards", "--static", *SMALL)
    ),
    "tuned": Part(
        200,
        (*VERIFIER, "forwards", "--compiled", *SHAPE, "--inductor", "coordinate_descent_tuning=1"),
        (*VERIFIER, "forwards", *SMALL, "--inductor", "coordinate_descent_tuning=1"),
    ),
    "profile": Part(
        90,
        (*VERIFIER, "forwards", "--compiled", *SHAPE, "--sessions", "1", "16", "--profile"),
        (*VERIFIER, "forwards", *SMALL),
    ),
    "large": Part(
        200,
        (*VERIFIER, "forwards", "--compiled", "--shape", "32B", "--draft", "5", "--sessions", "1", "16"),
        (*VERIFIER, "forwards", *SMALL),
    ),
    "exact": Part(
        120, (*VERIFIER, "forwards", "--compiled", "--exact", *SHAPE, "--sessions", "1", "16"),
        (*VERIFIER, "forwards", *SMALL),
    ),
}  # fmt: skip


def save_divisible_family(path: Path) -> Path:
    """Save a random target whose heads can be split over several GPUs, and the toy family's draft as one for it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from edge_runtime.protocol.bundle import MANIFEST_NAME
    from tests.toy_family import FAMILY

    heads = {"hidden_size": 512, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 32}
    config = AutoConfig.from_pretrained(FAMILY / "target-v1", **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(path / "target-v1")
    AutoTokenizer.from_pretrained(FAMILY / "target-v1").save_pretrained(path / "target-v1")
    shutil.copytree(FAMILY / "bundle", path / "bundle")
    manifest = json.loads((path / "bundle" / MANIFEST_NAME).read_text())
    manifest["shared"] = {"layout": "standalone", "blocks": 0, "fingerprints": {}}
    (path / "bundle" / MANIFEST_NAME).write_text(json.dumps(manifest))
    return path


def verify_over_http(device: str, gpus: int) -> int:
    """Serve a small target on `device`, compare its texts under several plans, and stop it with SIGTERM."""
    import httpx

    from tests.toy_family import FAMILY

    with tempfile.TemporaryDirectory() as directory:
        family = save_divisible_family(Path(directory)) if gpus > 1 else FAMILY
        command = [sys.executable, "-m", "cloud_verifier.cli", "--log-level", "info", "serve"]
        command.append(str(family / "target-v1"))
        command += ["--device", device, "--port", "0"] + ["--gpus", str(gpus)] * (gpus > 1)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            started = time.monotonic()
            try:
                # It ends without an output if it cannot serve.
                words = server.stdout.readline().split()
                if not words:
                    return server.wait(60) or 1
                print(f"ready in {time.monotonic() - started:.1f} s: {server.stdout.readline().strip()}", flush=True)
                assert httpx.get(f"{words[-1]}/readyz").status_code == 200
                plans = [sys.executable, "-m", "tests.benchmarks.plans", words[-1], "--tokens", "48"]
                plans += ["--bundle", str(family / "bundle")]
                differing = subprocess.run(plans, check=False).returncode
            finally:
                server.terminate()
            code = server.wait(60)
    print(f"plans: exit code {differing}; the verifier after SIGTERM: {code}")
    return differing or code


def run_part(name: str, part: Part, options: argparse.Namespace) -> dict[str, object]:
    words = part.dry if options.dry_run else part.words
    command = [sys.executable, "-m", *words]
    if part.tables:
        command += ["--json", str(options.out.resolve() / "tables.jsonl")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(INSTALLED)]), "PYTHONUNBUFFERED": "1"}
    started, code = time.monotonic(), 0
    with (options.out / f"{name}.log").open("w") as log:
        log.write(" ".join(command) + "\n")
        log.flush()
        # A session of its own, so that what it has started ends with it.
        with subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        ) as process:
            try:
                code = process.wait(part.seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                code = 124
    result = {"part": name, "code": code, "seconds": round(time.monotonic() - started, 1)}
    tail = (options.out / f"{name}.log").read_text(errors="replace").splitlines()[-options.lines :]
    print(f"\n== {name}: exit code {code} after {result['seconds']} s\n" + "\n".join(tail), flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="directory for logs and tables")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds for all (default: %(default)s)")
    parser.add_argument("--lines", type=int, default=30, help="last lines of each log to print (default: %(default)s)")
    parser.add_argument("--wheels", type=Path, help="directory of wheels to install first, without a network")
    parser.add_argument("--packages", action="store_true", help="print the packages that may be needed as wheels")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--http", metavar="DEVICE", help=argparse.SUPPRESS)
    parser.add_argument("--gpus", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.packages:
        print(*PACKAGES.values())
        return 0
    if options.http:
        return verify_over_http(options.http, options.gpus)
    if options.out is None:
        parser.error("OUT is required")
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.wheels:
        missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
        here = [name for name in missing if any(options.wheels.glob(f"{name.replace('-', '[-_]')}-*.whl"))]
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        install += ["--find-links", str(options.wheels), "--target", str(INSTALLED), *here]
        print("installed:", *here, "; lacking:", *(set(missing) - set(here)), flush=True)
        if here:
            subprocess.run(install, check=True)
    results: list[dict[str, object]] = []
    for name in options.parts:
        part = PARTS[name]
        if time.monotonic() - started + part.seconds > options.budget:
            print(f"\n== {name}: left out, it may take {part.seconds} s", flush=True)
            results.append({"part": name, "code": None, "seconds": 0.0})
            continue
        results.append(run_part(name, part, options))
        (options.out / "summary.json").write_text(json.dumps(results, indent=1))
    print("\n" + "\n".join(f"{result['part']}: {result['code']} ({result['seconds']} s)" for result in results))
    return int(any(result["code"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
