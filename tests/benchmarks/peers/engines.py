"""The engines of `peers`, each run in a process of its own: `python engines.py NAME JSON` prints what it measured.

Not all of them fit into one environment, so this file also runs in other interpreters: at its top, it imports only the
standard library and `stopwatch`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __package__:
    from tests.benchmarks.peers.stopwatch import Stopwatch
else:
    from stopwatch import Stopwatch  # type: ignore[import-not-found,no-redef]

# Rows of the forwards that are timed, and forwards whose mean is one measurement.
ROWS, FORWARDS = (1, 2, 4, 6, 8), 8
# Tokens of each text of a first, unmeasured round of all streams: engines capture graphs and compile kernels by the
# number of streams.
WARM_UP_TOKENS = 8
# Where servers listen.
PORT = 18573
READY_SECONDS = 900.0
NODE_PROGRAM = """
import {getLlama, DraftSequenceTokenPredictor} from "node-llama-cpp";
const {gguf, draft, draftTokens, prompts, tokens, threads, rows, forwards} = JSON.parse(process.argv[2]);
const llama = await getLlama({gpu: false, build: "never", maxThreads: threads, logLevel: "error"});
const model = await llama.loadModel({modelPath: gguf});
const options = {contextSize: 1024, threads, flashAttention: false};
const context = await model.createContext({...options, sequences: prompts.length});
const cpu = () => { const used = process.cpuUsage(); return (used.user + used.system) / 1e6; };
const predictor = async () => {
    if (!draft) return {};
    const draftModel = await llama.loadModel({modelPath: draft});
    const draftContext = await draftModel.createContext(options);
    return {tokenPredictor: new DraftSequenceTokenPredictor(
        draftContext.getSequence(), {minTokens: draftTokens, maxTokens: draftTokens, minConfidence: 0})};
};
const sequences = [];
for (const _ of prompts) sequences.push(context.getSequence(await predictor()));
await sequences[0].evaluateWithoutGeneratingNewTokens(prompts[0].slice(0, 4));
await sequences[0].clearHistory();
const started = performance.now();
const streams = await Promise.all(prompts.map(async (prompt, index) => {
    const arrivals = [], text = [];
    for await (const token of sequences[index].evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        text.push(token);
        arrivals.push([(performance.now() - started) / 1e3, cpu(), 1]);
        if (text.length == tokens) break;
    }
    return {arrivals, text};
}));
const forward = {};
for (const count of rows) {
    const [sequence] = sequences, [prompt] = prompts;
    await sequence.clearHistory();
    await sequence.evaluateWithoutGeneratingNewTokens(prompt);
    let used = 0;
    for (let i = 0; i < forwards; i++) {
        const before = cpu();
        await sequence.controlledEvaluate(
            streams[0].text.slice(0, count).map((id) => [id, {generateNext: {token: true}}]));
        used += cpu() - before;
        await sequence.eraseContextTokenRanges([{start: prompt.length, end: prompt.length + count}]);
    }
    forward[count] = used / forwards;
}
const result = {arrivals: streams.map((each) => each.arrivals), texts: streams.map((each) => each.text), rows: forward};
process.stdout.write(JSON.stringify(result), () => process.exit(0));
"""


def find_clock(
    options: argparse.Namespace, processor_time: Callable[[], float] = time.process_time
) -> Callable[[], float]:
    """What an engine's time is measured by: processor time, which other programs change little, of one stream on a CPU.

    Args:
        processor_time: of the engine. It may take milliseconds to find out that of a server, whose processes must be
            found first: too long for each token of many streams.
    """
    return processor_time if options.device == "cpu" and len(options.prompts) == 1 else time.perf_counter


def time_forwards(forward: Callable[[int], object], clock: Callable[[], float] = time.process_time) -> dict[int, float]:
    """The time of `forward(rows)` by rows, which returns once the device has computed it."""
    seconds = {}
    for rows in ROWS:
        forward(rows)
        started = clock()
        for _ in range(FORWARDS):
            forward(rows)
        seconds[rows] = (clock() - started) / FORWARDS
    return seconds


def run_transformers(options: argparse.Namespace, **generation: Any) -> dict[str, Any]:
    """`generate`.

    Args:
        generation: further arguments of `generate`; without any, forwards are timed, too.
    """
    import torch
    from transformers import DynamicCache
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(options.threads)
    model = load_in_torch(options.target, options)
    prompt = torch.tensor(options.prompts, device=options.device)
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **generation}
    for _ in range(2):
        # What is compiled is compiled by two texts: one does not tell what changes.
        model.generate(prompt, max_new_tokens=options.tokens, **greedy)
    stopwatch = Stopwatch(engine_clock=find_clock(options))

    class Tokens(BaseStreamer):  # type: ignore[misc]  # transformers has no types here
        def __init__(self) -> None:
            self._has_prompt = False

        def put(self, value: torch.Tensor) -> None:
            if self._has_prompt:
                stopwatch.add(*value.flatten().tolist())
            self._has_prompt = True

        def end(self) -> None:
            pass

    model.generate(prompt, max_new_tokens=options.tokens, streamer=Tokens(), **greedy)
    if generation:
        return stopwatch.result()
    with torch.inference_mode():
        past = DynamicCache()
        model(input_ids=prompt, past_key_values=past)

        def forward(rows: int) -> None:
            ids = torch.tensor([stopwatch.text[:rows]], device=options.device)
            model(input_ids=ids, past_key_values=past).logits.argmax(-1).cpu()
            past.crop(-rows)

        return stopwatch.result(time_forwards(forward, find_clock(options)))


def load_in_torch(path: Path, options: argparse.Namespace) -> Any:
    """The model at `path` in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, options.dtype))
    return model.to(options.device).eval()


def run_static_cache(options: argparse.Namespace) -> dict[str, Any]:
    return run_transformers(options, cache_implementation="static", disable_compile=True)


def run_compiled(options: argparse.Namespace) -> dict[str, Any]:
    from transformers import CompileConfig

    # transformers compiles by itself on a GPU only.
    compilation = CompileConfig()
    compilation._compile_all_devices = True
    return run_transformers(options, cache_implementation="static", compile_config=compilation)


def run_assisted(options: argparse.Namespace) -> dict[str, Any]:
    draft = load_in_torch(options.draft, options)
    draft.generation_config.num_assistant_tokens = options.draft_tokens
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0
    return run_transformers(options, assistant_model=draft)


def run_continuous_batching(options: argparse.Namespace) -> dict[str, Any]:
    from transformers import GenerationConfig

    model = load_in_torch(options.target, options)
    # No token has this number.
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Where it is asked to stream depends on the version.
    streaming = {"streaming": True}
    accepts = "streaming" in inspect.signature(model.init_continuous_batching).parameters
    manager = model.init_continuous_batching(generation_config=greedy, **(streaming if accepts else {}))
    if accepts:
        streaming = {}
    manager.start()
    try:
        prompts, seen = options.prompts, 0
        for length in (WARM_UP_TOKENS, options.tokens):
            stopwatch, counts = Stopwatch(len(prompts)), dict.fromkeys(range(len(prompts)), 0)
            for index, prompt in enumerate(prompts):
                manager.add_request(prompt, request_id=f"{seen + index}", max_new_tokens=length, **streaming)
            while min(counts.values()) < length:
                output = manager.get_result(timeout=1)
                if output is not None:
                    index, tokens = int(output.request_id) - seen, output.generated_tokens
                    stopwatch.add(*tokens[counts[index] :], stream=index)
                    counts[index] = len(tokens)
            seen += len(prompts)
        return stopwatch.result()
    finally:
        manager.stop(block=True)


def open_genai(options: argparse.Namespace, *, drafting: bool) -> Any:
    import onnxruntime_genai as og

    config = og.Config(str(options.genai))
    session = {"session_options": {"intra_op_num_threads": options.threads}}
    batching = {"static_batching": {"max_batch_size": len(options.prompts)}}
    overlay: dict[str, Any] = {"model": {"decoder": session}, "engine": batching}
    if drafting:
        overlay["model"]["draft"] = json.loads((options.genai / "draft.json").read_text()) | session
        overlay["speculative"] = {"max_draft_tokens": options.draft_tokens}
    config.overlay(json.dumps(overlay))
    return og.Model(config)


def run_genai(options: argparse.Namespace, *, drafting: bool = False) -> dict[str, Any]:
    import onnxruntime_genai as og

    model = open_genai(options, drafting=drafting)
    [prompt] = options.prompts

    def generator(ids: list[int]) -> Any:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=len(prompt) + options.tokens + 64)
        made = og.Generator(model, parameters)
        made.append_tokens(ids)
        return made

    generator(prompt[:4]).generate_next_token()
    stopwatch = Stopwatch(engine_clock=find_clock(options))
    stream = generator(prompt)
    while len(stopwatch.text) < options.tokens and not stream.is_done():
        stream.generate_next_token()
        stopwatch.add(*map(int, stream.get_next_tokens()))
    if drafting:
        return stopwatch.result() | {"statistics": stream.get_speculative_stats()}
    rounds = generator(prompt)

    def forward(rows: int) -> None:
        rounds.append_tokens(stopwatch.text[:rows])
        rounds.get_output("logits")
        rounds.rewind_to(len(prompt))

    return stopwatch.result(time_forwards(forward))


def run_genai_drafting(options: argparse.Namespace) -> dict[str, Any]:
    return run_genai(options, drafting=True)


def run_genai_engine(options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    import onnxruntime_genai as og

    engine, prompts = og.Engine(open_genai(options, drafting=False)), options.prompts
    for tokens in (WARM_UP_TOKENS, options.tokens):
        stopwatch, numbers, requests = Stopwatch(len(prompts)), {}, []
        for index, prompt in enumerate(prompts):
            request = engine.create_request()
            turn = og.TurnOptions(request)
            turn.set_do_sample(False)
            turn.set_min_generated_tokens(tokens)
            turn.set_max_generated_tokens(tokens)
            request.begin_turn(np.array(prompt, np.int32), turn)
            numbers[id(request)] = index
            requests.append(request)
        events = engine.create_event_buffer(4 * len(prompts))
        while engine.has_pending_requests():
            for event in engine.run(events):
                if event.flags & og.EngineEventFlags.FAILED:
                    raise RuntimeError(f"the engine failed: {event.error_code}")
                if event.flags & og.EngineEventFlags.TOKEN:
                    stopwatch.add(int(event.token), stream=numbers[id(event.request)])
        for request in requests:
            request.close()
    return stopwatch.result()


def run_node_llama(options: argparse.Namespace, *, drafting: bool = False) -> dict[str, Any]:
    program = options.node / "flexspec-peers.mjs"
    program.write_text(NODE_PROGRAM)
    arguments = {
        "gguf": str(options.gguf_float),
        "draft": str(options.draft_gguf) if drafting else None,
        "draftTokens": options.draft_tokens,
        "prompts": options.prompts,
        "tokens": options.tokens,
        "threads": options.threads,
        "rows": ROWS if len(options.prompts) == 1 and not drafting else [],
        "forwards": FORWARDS,
    }
    done = subprocess.run(
        ["node", program.name, json.dumps(arguments)], cwd=options.node, stdout=subprocess.PIPE, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_node_llama_drafting(options: argparse.Namespace) -> dict[str, Any]:
    return run_node_llama(options, drafting=True)


@contextlib.contextmanager
def run_server(
    command: list[str], ready: Callable[[str], str | None] | None = None, health: str = ""
) -> Iterator[tuple[str, Callable[[], float]]]:
    """Run an engine's server; yields its URL and a function that returns its processor time.

    Args:
        ready: finds the URL in a line of the server's output.
        health: without `ready`, the URL that answers once the server does; its output goes to stderr.
    """
    import httpx
    import psutil

    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if ready else {"stdout": sys.stderr}
    with subprocess.Popen(command, text=True, **output) as process:  # type: ignore[call-overload]
        server = psutil.Process(process.pid)
        try:
            if ready:
                url = next(found for line in process.stdout if (found := ready(line)))
            else:
                url, deadline = health.rpartition("/")[0], time.monotonic() + READY_SECONDS
                while True:
                    with contextlib.suppress(httpx.TransportError):
                        if httpx.get(health).is_success:
                            break
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(f"{command[0]} does not serve")
                    time.sleep(0.2)
            yield url, lambda: sum(sum(each.cpu_times()[:2]) for each in [server, *server.children(recursive=True)])
        finally:
            process.terminate()


async def stream_completions(
    url: str, requests: list[dict[str, Any]], stopwatch: Stopwatch, find_tokens: Callable[[dict[str, Any]], list[int]]
) -> None:
    """Post requests at once and note the tokens of their server-sent events, which `find_tokens` finds."""
    import httpx

    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as client:

        async def read(index: int, request: dict[str, Any]) -> None:
            async with client.stream("POST", url, json=request) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        stopwatch.add(*find_tokens(json.loads(line[6:])), stream=index)

        await asyncio.gather(*(read(index, request) for index, request in enumerate(requests)))


def run_completions(
    options: argparse.Namespace,
    command: list[str],
    path: str,
    make_request: Callable[[list[int], int], dict[str, Any]],
    find_tokens: Callable[[dict[str, Any]], list[int]],
) -> dict[str, Any]:
    """Run a server that streams completions, and ask it for all texts at once.

    Args:
        path: of completions.
        make_request: makes a request of a prompt and a number of tokens.
        find_tokens: see `stream_completions`.
    """
    with run_server(command, health=f"http://127.0.0.1:{PORT}/health") as (url, processor_time):
        for tokens in (WARM_UP_TOKENS, options.tokens):
            stopwatch = Stopwatch(len(options.prompts), find_clock(options, processor_time))
            requests = [make_request(prompt, tokens) for prompt in options.prompts]
            asyncio.run(stream_completions(url + path, requests, stopwatch, find_tokens))
    return stopwatch.result()


def run_llama_server(options: argparse.Namespace, *, drafting: bool = False) -> dict[str, Any]:
    streams = len(options.prompts)
    command = [options.llama_server, "--model", str(options.gguf_float), "--port", str(PORT), "--no-webui"]
    command += ["--threads", str(options.threads), "--ctx-size", str(1024 * streams), "--parallel", str(streams)]
    if drafting:
        command += ["--model-draft", str(options.draft_gguf), "--draft-p-min", "0"]
        command += ["--draft-min", str(options.draft_tokens), "--draft-max", str(options.draft_tokens)]

    def make_request(prompt: list[int], tokens: int) -> dict[str, Any]:
        fields = {"temperature": 0, "ignore_eos": True, "return_tokens": True, "cache_prompt": False}
        return {"prompt": prompt, "n_predict": tokens, "stream": True, **fields}

    return run_completions(options, command, "/completion", make_request, lambda event: event.get("tokens") or [])


def run_llama_server_drafting(options: argparse.Namespace) -> dict[str, Any]:
    return run_llama_server(options, drafting=True)


def run_vllm(options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(options.target)]
    command += ["--port", str(PORT), "--dtype", options.dtype, "--no-enable-prefix-caching"]

    def make_request(prompt: list[int], tokens: int) -> dict[str, Any]:
        fields = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return {"model": str(options.target), "prompt": prompt, "max_tokens": tokens, "stream": True, **fields}

    def find_tokens(event: dict[str, Any]) -> list[int]:
        return [token for choice in event["choices"] for token in choice.get("token_ids") or []]

    return run_completions(options, command, "/v1/completions", make_request, find_tokens)


def run_sglang(options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(options.target)]
    command += ["--port", str(PORT), "--dtype", options.dtype, "--disable-radix-cache"]

    def make_request(prompt: list[int], tokens: int) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        return {"input_ids": prompt, "sampling_params": sampling, "stream": True}

    # Every event has the whole text so far, unless the server streams increments.
    seen: dict[str, int] = {}

    def find_tokens(event: dict[str, Any]) -> list[int]:
        ids, request = event["output_ids"], event["meta_info"]["id"]
        new = event["meta_info"]["completion_tokens"] - seen.get(request, 0)
        seen[request] = event["meta_info"]["completion_tokens"]
        return list(ids[-new:]) if new else []

    return run_completions(options, command, "/generate", make_request, find_tokens)


def run_verifier(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from cloud_verifier.model.kv_cache import CachedSequence
    from cloud_verifier.model.target import Target
    from cloud_verifier.model.tree import TokenTree

    torch.set_num_threads(options.threads)
    gpu = options.device != "cpu"
    target = Target(options.target, device=options.device, dtype=getattr(torch, options.dtype), compiled=gpu)
    pool: Any = target.runner.shape.make_pool(4096)
    target.runner.warm_up(pool)
    sequence = CachedSequence()
    [prompt] = options.prompts

    def verify(tokens: list[int], keep: bool) -> list[int]:
        """The target's tokens after each of `tokens`."""
        tree = TokenTree(tokens[0], sequence.length + 1, tokens[1:], {})
        [sampled] = target.run(pool, [target.tree_segment(sequence, tree)])
        assert sampled is not None
        pool.keep(sequence, [0] if keep else [])
        return [sampled[row].token for row in range(len(tokens))]

    stopwatch = Stopwatch(engine_clock=find_clock(options))
    target.run(pool, [target.prefill_segment(sequence, prompt[:-1])])
    pool.keep(sequence, list(range(len(prompt) - 1)))
    stopwatch.add(*verify(prompt[-1:], keep=True))
    while len(stopwatch.text) < options.tokens:
        stopwatch.add(*verify(stopwatch.text[-1:], keep=True))
    return stopwatch.result(time_forwards(lambda rows: verify(stopwatch.text[:rows], keep=False), find_clock(options)))


def run_verifier_http(options: argparse.Namespace, *, drafting: bool = False) -> dict[str, Any]:
    from edge_runtime.protocol.sampling import Sampling
    from edge_runtime.verifier.client import VerifierClient
    from edge_runtime.verifier.session import VerifierSession

    async def stream(url: str, prompts: list[list[int]], tokens: int, stopwatch: Stopwatch) -> None:
        async with VerifierClient(url) as client:

            async def read(index: int, prompt: list[int]) -> None:
                session = VerifierSession(client, prompt, Sampling(ignore_eos=True))
                async for update in session.run_round([], n=tokens, stream=True):
                    stopwatch.add(*update.own, stream=index)

            await asyncio.gather(*(read(index, prompt) for index, prompt in enumerate(prompts)))

    command = [sys.executable, "-m", "cloud_verifier.cli", "serve", str(options.target), "--port", "0"]
    command += ["--threads", str(options.threads), "--no-prefix-cache", "--dtype", options.dtype]
    command += ["--device", options.device]
    if drafting:
        command += ["--draft", str(options.bundle), "--draft-threads", str(options.threads)]
    with run_server(command, lambda line: line.split()[-1] if " on http" in line else None) as (url, processor_time):
        for tokens in (WARM_UP_TOKENS, options.tokens):
            stopwatch = Stopwatch(len(options.prompts), find_clock(options, processor_time))
            asyncio.run(stream(url, options.prompts, tokens, stopwatch))
    return stopwatch.result()


def run_verifier_drafting(options: argparse.Namespace) -> dict[str, Any]:
    return run_verifier_http(options, drafting=True)


# By name: what measures one stream, and what measures several at once.
SINGLE_STREAM: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "transformers": run_transformers,
    "transformers, static": run_static_cache,
    "transformers, compiled": run_compiled,
    "transformers, drafting": run_assisted,
    "onnxruntime-genai": run_genai,
    "onnxruntime-genai, drafting": run_genai_drafting,
    "llama.cpp": run_node_llama,
    "llama.cpp, drafting": run_node_llama_drafting,
    "llama.cpp server": run_llama_server,
    "llama.cpp server, drafting": run_llama_server_drafting,
    "vLLM": run_vllm,
    "SGLang": run_sglang,
    "FlexSpec": run_verifier,
    "FlexSpec, HTTP": run_verifier_http,
    "FlexSpec, HTTP, drafting": run_verifier_drafting,
}
SEVERAL_STREAMS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "transformers, continuous batching": run_continuous_batching,
    "onnxruntime-genai": run_genai_engine,
    "llama.cpp": run_node_llama,
    "llama.cpp server": run_llama_server,
    "vLLM": run_vllm,
    "SGLang": run_sglang,
    "FlexSpec, HTTP": run_verifier_http,
    "FlexSpec, HTTP, drafting": run_verifier_drafting,
}
# Options of a child process that are paths.
PATHS = ("target", "genai", "gguf_float", "draft", "draft_gguf", "bundle", "node")


def main() -> None:
    name, given = sys.argv[1:]
    options = argparse.Namespace(**json.loads(given))
    for key in PATHS:
        setattr(options, key, Path(getattr(options, key)))
    engines = SINGLE_STREAM if len(options.prompts) == 1 else SEVERAL_STREAMS
    print(json.dumps(engines[name](options)), flush=True)


if __name__ == "__main__":
    main()
