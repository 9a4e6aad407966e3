"""Cost of verification: `python -m tests.benchmarks.verifier forwards|prefill|serving|sharing|texts`.

forwards   one round of many sessions on models of real shapes with random weights, relative to the floor of reading
           weights and KV cache once
prefill    prompts on the same models, relative to the device's rate for matrices of their dtype
serving    the engine with such a model: streams, boards' drafts, and streams beside prompts of 8,192 tokens that arrive
           without end
sharing    tokens per second of the shipped family with 16 sessions in one batch, and one by one
texts      how often a text depends on the batch, the margins at the first difference, and the cost of `exact`
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from cloud_verifier.engine.scheduler import Scheduler
from cloud_verifier.engine.sessions import RoundReply, Session
from cloud_verifier.model import layer_compilation
from cloud_verifier.model.batch import Segment
from cloud_verifier.model.kv_cache import CACHE_FORMATS, CachedSequence, KVCachePool
from cloud_verifier.model.quantization import METHODS, quantize_layers
from cloud_verifier.model.target import Target, make_runner
from cloud_verifier.model.tree import TokenTree
from edge_runtime.common.memory import freeze_objects
from edge_runtime.protocol.messages import PROTOCOL_VERSION, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from tests.toy_family import FAMILY

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES: dict[str, dict[str, int]] = {
    # For a look at whether a benchmark runs, on any machine.
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "32B": {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
}
# Milliseconds on an H200: the goal (chosen), and the time of a CUDA graph of transformers' own forward (measured).
GOALS = {("7B", 1): (6.1, 7.9), ("7B", 16): (9.0, 11.2), ("7B", 64): (18.0, 26.0), ("32B", 1): (22.0, 25.5)}

# Largest KV cache of `forwards`.
MAX_POOL_BYTES = 50e9 if DEVICE == "cuda" else 1e9
# Longest text of the models with random weights.
MAX_CONTEXT = 20480
# Streams at once, tokens of each and of its prompt, in `serving`; and the prompts that keep arriving.
STREAMS, STREAM_TOKENS, STREAM_PROMPT, LONG_PROMPT = (1, 16, 64), 128, 512, 8192

PROMPTS = (
    "import os\n\n\ndef main(",
    "class Stack:\n    def __init__(self",
    "def fibonacci(n: int) -> int:\n",
    "for index, line in enumerate(",
    "try:\n    import json\nexcept",
    "    def test_empty(self):\n        ",
    "#!/usr/bin/env python\n# -*- coding",
    "with open(path, 'rb') as",
)


def make_random_model(shape: str, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Make a Llama of a real shape with random weights."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=MAX_CONTEXT, tie_word_embeddings=False)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.nn.init.normal_ = lambda tensor, *_, **__: tensor  # type: ignore[assignment]
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            with torch.no_grad():
                for weights in model.parameters():
                    weights.copy_(torch.empty_like(weights).uniform_(-0.03, 0.03) if weights.ndim > 1 else 1.0)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval()


def measure_bandwidth() -> float:
    """Return the bytes per second of this GPU's memory for a copy, reads and writes counted."""
    source = torch.empty(1 << (30 if DEVICE == "cuda" else 24), dtype=torch.int64, device=DEVICE)
    copy = torch.empty_like(source)
    return 2 * source.nbytes / min(time_each(lambda: copy.copy_(source), 5))


def measure_matrix_rate() -> float:
    """Return the operations per second of this device for large bfloat16 matrices with random values."""
    size = 8192 if DEVICE == "cuda" else 512
    left, right = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    return 2 * size**3 / statistics.median(time_each(lambda: left @ right, 12)[2:])


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def time_each(work: Callable[[], object], repeats: int) -> list[float]:
    """The seconds of each of `repeats` calls."""
    seconds = []
    for _ in range(repeats):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def report(table: Table, options: argparse.Namespace, **facts: Any) -> None:
    """Print a table, and add it to the JSON lines of `--json`."""
    Console(width=140).print(table)
    if options.json is None:
        return
    columns = [list(column.cells) for column in table.columns]
    rows = [
        dict(zip((str(c.header) for c in table.columns), cells, strict=True)) for cells in zip(*columns, strict=True)
    ]
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    entry = {"title": str(table.title), "device": device, "torch": torch.__version__, "rows": rows, **facts}
    with options.json.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def make_rounds(pool: KVCachePool, sessions: int, draft: int, context: int) -> list[Segment]:
    """Make one round for each session, after `context` tokens."""
    segments = []
    for _ in range(sessions):
        sequence = CachedSequence()
        pool.reserve(sequence, context + 80)
        sequence.length = context
        tree = TokenTree(7, context + 1, list(range(10, 10 + draft)), {})
        segments.append(Segment.from_tree(sequence, tree, Sampling(1.0, seed=5)))
    return segments


def median_ms(work: Any, seconds: float = 1.5) -> float:
    """The median of the milliseconds of calls for so many seconds, after as many more in which a clock settles."""
    repeats = max(5, round(seconds / statistics.median(time_each(work, 5))))
    return 1e3 * statistics.median(time_each(work, 2 * repeats)[repeats:])


def profile(work: Any) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            work()
        torch.cuda.synchronize()
    print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=14, max_name_column_width=70))


def forwards(options: argparse.Namespace) -> None:
    from cloud_verifier.model.tensor_parallel import TensorParallelGroup

    group = TensorParallelGroup() if "RANK" in os.environ else None
    speed = measure_bandwidth()
    gpus = f"{group.size if group else 1} x {torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU'}"
    variant = "".join(f", {name}" for name in ("exact", "compiled") if getattr(options, name))
    if options.static:
        layer_compilation.DYNAMIC_ROWS = False
        variant += ", for each size"
    if options.quantize:
        variant += f", {options.quantize}"
    if options.kv_cache_dtype:
        variant += f", {options.kv_cache_dtype} cache"
    for each in options.inductor:
        name, _, value = each.partition("=")
        layer_compilation.INDUCTOR_OPTIONS[name] = bool(int(value))
        variant += f", {name}"
    table = Table(title=f"one round, bfloat16, {gpus}{variant}")
    for column in (
        "shape",
        "context",
        "sessions",
        "K",
        "round, ms",
        "floor, ms",
        "round / floor",
        "goal, ms",
        "ready, s",
    ):
        table.add_column(column, justify="right")
    for shape in options.shape:
        model = make_random_model(shape, DEVICE)
        whole = sum(value.nbytes for value in model.parameters())
        if options.quantize:
            quantize_layers(model, options.quantize)
        runner = make_runner(
            model,
            max(options.context) + 160,
            exact=options.exact,
            compiled=options.compiled,
            group=group,
            cache_dtype=CACHE_FORMATS.get(options.kv_cache_dtype),
        )
        local = [value._local_tensor if hasattr(value, "_local_tensor") else value for value in model.parameters()]
        # Those of fused layers are twice among the parameters.
        weights = sum(value.nbytes for value in local) if group else whole
        weights -= model.get_input_embeddings().weight.nbytes
        # Beyond a bound, which leaves memory for the weights of 32B, fewer sessions are measured.
        tokens = max(options.sessions) * (max(options.context) + 160)
        pool = KVCachePool(runner.shape, min(tokens, int(MAX_POOL_BYTES / runner.shape.bytes_per_token)))
        if group and group.rank:
            runner.follow_leader(pool)
            continue
        for context, sessions, draft in itertools.product(options.context, options.sessions, options.draft):
            if sessions * (1 + draft) > runner.max_rows or pool.capacity_pages * 64 < sessions * (context + 160):
                continue
            segments = make_rounds(pool, sessions, draft, context)
            started = time.perf_counter()
            runner.run(pool, segments)
            ready = time.perf_counter() - started
            round_ms = median_ms(functools.partial(runner.run, pool, segments))
            if options.profile:
                profile(functools.partial(runner.run, pool, segments))
            cache = sessions * context * runner.shape.bytes_per_token
            floor = 1e3 * (weights + cache) / speed
            goal, naive = GOALS.get((shape, sessions), (None, None)) if (draft, context) == (5, 512) else (None, None)
            goal_text = f"{goal} (naive graph {naive})" if goal else ""
            row = (str(sessions), str(draft), f"{round_ms:.2f}", f"{floor:.2f}", f"{round_ms / floor:.2f}")
            table.add_row(shape, str(context), *row, goal_text, f"{ready:.1f}")
            for segment in segments:
                pool.release(segment.sequence)
        if group:
            group.stop_followers()
        del runner, model, pool, local
        torch.cuda.empty_cache()
    if group and group.rank:
        return
    report(table, options, bandwidth=speed)
    print(f"memory bandwidth: {speed / 1e12:.2f} TB/s (a copy, reads and writes counted)")


def prefill(options: argparse.Namespace) -> None:
    rate = measure_matrix_rate()
    table = Table(title="prefill, bfloat16" + (", compiled" if options.compiled else ""))
    for column in ("shape", "prompts", "tokens each", "ms", "TFLOP/s", "share of the matrix rate", "peak memory, GiB"):
        table.add_column(column, justify="right")
    for shape in options.shape:
        model = make_random_model(shape, DEVICE)
        config = model.config
        matrices = sum(layer.weight.numel() for layer in model.model.modules() if isinstance(layer, torch.nn.Linear))
        runner = make_runner(model, MAX_CONTEXT, compiled=options.compiled)
        pool = KVCachePool(runner.shape, 2 * max(each * count for each, count in options.prompts))
        for length, prompts in options.prompts:

            def run(length: int = length, prompts: int = prompts, runner: Any = runner, pool: Any = pool) -> None:
                sequences = [CachedSequence() for _ in range(prompts)]
                for start in range(0, length * prompts, runner.max_prefill_rows):
                    left, segments = min(runner.max_prefill_rows, length * prompts - start), []
                    for sequence in sequences:
                        if rows := min(left, length - sequence.length):
                            segments.append(Segment.from_tokens(sequence, [7] * rows))
                            left -= rows
                    runner.run(pool, segments)
                    for segment in segments:
                        pool.keep(segment.sequence, list(range(len(segment))))
                for sequence in sequences:
                    pool.release(sequence)

            run()
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = statistics.median(time_each(run, 5))
            peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0
            # Two operations for each weight; and for each pair of a query and a key, of which causality leaves half.
            pairs = length * length / 2 * config.num_hidden_layers * config.num_attention_heads
            operations = prompts * (2 * matrices * length + 4 * pairs * config.head_dim)
            row = (f"{1e3 * seconds:.1f}", f"{operations / seconds / 1e12:.0f}", f"{operations / seconds / rate:.2f}")
            table.add_row(shape, str(prompts), str(length), *row, f"{peak:.1f}")
        del runner, model, pool
    report(table, options, matrix_rate=rate)
    print(f"matrix rate: {rate / 1e12:.0f} TFLOP/s (bfloat16, random values)")


class RandomTarget(Target):
    """A target with random weights of a real shape, which has no checkpoint and no tokenizer."""

    def __init__(self, shape: str, *, compiled: bool) -> None:
        model = make_random_model(shape, DEVICE)
        self.runner = make_runner(model, MAX_CONTEXT, compiled=compiled)
        self.name, self.version, self.vocabulary = shape, f"{shape}@random", ""
        self.context, self.vocabulary_size, self.end_ids = MAX_CONTEXT, model.config.vocab_size, frozenset()
        self.dtype, self.device = torch.bfloat16, torch.device(DEVICE)
        self.adapter_slot, self.general_tier_reason = 0, ""
        self._adapter_weights, self._rope = None, self.runner.rope


async def start_engine(engine: Scheduler) -> None:
    """Start an engine, and wait until its target is ready."""
    engine.start()
    while engine.target is None:
        if engine.failure:
            raise engine.failure
        await asyncio.sleep(0.01)
    # As `cloud-verifier serve` does.
    freeze_objects()


async def stream_text(engine: Scheduler, target: Target, prompt: list[int], tokens: int, gaps: list[float]) -> float:
    """Stream a text; returns the seconds to its first token, and adds those between frames per token to `gaps`."""
    request = RoundRequest(PROTOCOL_VERSION, 0, len(prompt), n=tokens, stream=True)
    reply = RoundReply(request)
    started = time.perf_counter()
    session = Session(list(prompt), Sampling(1.0, seed=len(gaps), ignore_eos=True), target, reply)
    engine.submit(session, reply)
    first = last = 0.0
    async for frame in reply.frames():
        now = time.perf_counter()
        if not first:
            first = now - started
        else:
            gaps += [(now - last) / len(frame.tokens)] * len(frame.tokens)
        last = now
    engine.release(session)
    return first


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def serving(options: argparse.Namespace) -> None:
    table = Table(title=f"the engine, {options.shape[0]}, bfloat16" + (", compiled" if options.compiled else ""))
    for column in ("what", "streams", "tokens/s", "first token p50 / p99, ms", "token p50 / p99, ms"):
        table.add_column(column, justify="right")
    started = time.perf_counter()
    target = RandomTarget(options.shape[0], compiled=options.compiled)
    engine = Scheduler(lambda: target, lambda _: None, lambda: 0, cache_tokens=0, reuse_prefixes=False)
    random, length = Random(1), options.prompt

    def make_prompt(tokens: int) -> list[int]:
        return [random.randrange(target.vocabulary_size) for _ in range(tokens)]

    async def measure() -> None:
        await start_engine(engine)
        print(f"ready in {time.perf_counter() - started:.1f} s, the model's construction included", flush=True)
        await stream_text(engine, target, make_prompt(length), 16, [])

        async def stream(count: int, what: str) -> None:
            gaps: list[float] = []
            begin = time.perf_counter()
            texts = (stream_text(engine, target, make_prompt(length), options.tokens, gaps) for _ in range(count))
            firsts = await asyncio.gather(*texts)
            rate = count * options.tokens / (time.perf_counter() - begin)
            shown = (
                f"{1e3 * percentile(each, 0.5):.1f} / {1e3 * percentile(each, 0.99):.1f}" for each in (firsts, gaps)
            )
            table.add_row(what, str(count), f"{rate:.0f}", *shown)

        for count in options.streams:
            await stream(count, "streaming")
        for count in options.streams:
            jobs = [(make_prompt(length), Sampling(1.0, seed=seed, ignore_eos=True)) for seed in range(count)]

            async def play(draft: int, expected: Any, jobs: Any = jobs) -> Any:
                texts = (
                    generate_text(
                        engine, target, *job, options.tokens, draft, index, expected[index] if expected else ()
                    )
                    for index, job in enumerate(jobs)
                )
                return await asyncio.gather(*texts)

            expected = [new for new, _ in await play(0, None)]
            begin = time.perf_counter()
            await play(5, expected)
            rate = count * options.tokens / (time.perf_counter() - begin)
            table.add_row("boards draft, K=5, 4 of 5 right", str(count), f"{rate:.0f}", "", "")
        firsts: list[float] = []

        async def send_long_prompts() -> None:
            while True:
                firsts.append(await stream_text(engine, target, make_prompt(options.long_prompt), 1, []))

        sending = [asyncio.create_task(send_long_prompts()) for _ in range(2)]
        await stream(min(16, max(options.streams)), f"beside prompts of {options.long_prompt}")
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
        if firsts:
            shown = f"{1e3 * percentile(firsts, 0.5):.0f} / {1e3 * percentile(firsts, 0.99):.0f}"
            table.add_row(f"these prompts of {options.long_prompt}", "2", "", shown, "")
        await asyncio.to_thread(engine.stop)

    asyncio.run(measure())
    report(table, options, cache_tokens=engine._cache_tokens)


async def generate_text(
    engine: Scheduler,
    target: Target,
    prompt: list[int],
    sampling: Sampling,
    count: int,
    draft: int,
    seed: int,
    expected: Sequence[int] = (),
) -> tuple[list[int], list[tuple[int, float]]]:
    """Generate a text as a board would, with 4 of 5 draft tokens right. Return it and its close calls."""
    random = Random(seed)
    request = RoundRequest(PROTOCOL_VERSION, 0, len(prompt), n=1 if draft else 16)
    answer = RoundReply(request)
    session = Session(list(prompt), sampling, target, answer)
    new: list[int] = []
    calls: list[tuple[int, float]] = []
    number = 0
    while True:
        engine.submit(session, answer)
        frame = await answer.result()
        new += answer.request.draft[: frame.accepted] + frame.tokens
        calls += frame.close_calls
        if len(new) >= count or frame.finish:
            engine.release(session)
            return new[:count], calls
        number += 1
        correct = expected[len(new) : len(new) + draft]
        guesses = [token if random.random() < 0.8 else random.randrange(target.vocabulary_size) for token in correct]
        n = 1 if draft else min(16, count - len(new))
        answer = session.begin_round(RoundRequest(PROTOCOL_VERSION, number, len(prompt) + len(new), draft=guesses, n=n))


async def generate_texts(
    target: Target,
    jobs: Sequence[tuple[list[int], Sampling]],
    count: int,
    draft: int,
    concurrency: int,
    expected_texts: Any = None,
) -> tuple[list[tuple[list[int], list[tuple[int, float]]]], float]:
    """Generate the texts of all jobs, `concurrency` at once. Return the results and the seconds."""
    engine = Scheduler(lambda: target, lambda _: None, lambda: 0, cache_tokens=64 * 1024)
    await start_engine(engine)
    slots = asyncio.Semaphore(concurrency)

    async def one(index: int) -> tuple[list[int], list[tuple[int, float]]]:
        async with slots:
            prompt, sampling = jobs[index]
            expected = expected_texts[index] if expected_texts else ()
            return await generate_text(engine, target, prompt, sampling, count, draft, index, expected)

    started = time.perf_counter()
    results = await asyncio.gather(*(one(index) for index in range(len(jobs))))
    seconds = time.perf_counter() - started
    await asyncio.to_thread(engine.stop)
    return results, seconds


def make_family_jobs(copies: int, temperature: float) -> list[tuple[list[int], Sampling]]:
    tokenizer = Tokenizer.from_file(str(FAMILY / "target-v1" / "tokenizer.json"))
    samplings = [Sampling(temperature, seed=seed, ignore_eos=True) for seed in range(copies)]
    return [(tokenizer.encode(prompt).ids, sampling) for sampling in samplings for prompt in PROMPTS]


def sharing(options: argparse.Namespace) -> None:
    target = Target(FAMILY / "target-v1", device=options.device, dtype=getattr(torch, options.dtype))
    jobs = make_family_jobs(4, 1.0)
    table = Table(title=f"{len(jobs)} texts of {options.tokens} tokens, {options.device}, {options.dtype}")
    for column in ("drafts", "one by one, tokens/s", "batch of 16, tokens/s", "ratio"):
        table.add_column(column, justify="right")
    expected_texts = [new for new, _ in asyncio.run(generate_texts(target, jobs, options.tokens, 0, 16))[0]]
    for draft in (0, 5):
        rates = []
        for concurrency in (1, 16):
            results, seconds = asyncio.run(
                generate_texts(target, jobs, options.tokens, draft, concurrency, expected_texts)
            )
            assert [new for new, _ in results] == expected_texts or options.dtype != "float32", (
                "a text depends on its batch"
            )
            rates.append(len(jobs) * options.tokens / seconds)
        name = "none (the target generates, n=16)" if not draft else f"K={draft}, 4 of 5 right"
        table.add_row(name, f"{rates[0]:.0f}", f"{rates[1]:.0f}", f"{rates[1] / rates[0]:.2f}")
    report(table, options)


# Of the targets whose texts are compared: dtype and further options, by device.
TEXT_TARGETS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "cpu": [("float32", {}), ("bfloat16", {}), ("float32", {"quantize": "int8"}), ("float32", {"cache_format": "fp8"})],
    "cuda": [
        ("float32", {}),
        *(
            ("bfloat16", quantization | exact)
            for quantization in ({}, {"quantize": "fp8"})
            for exact in ({}, {"exact": True})
        ),
        ("bfloat16", {"cache_format": "fp8", "exact": True}),
    ],
}


def texts(options: argparse.Namespace) -> None:
    table = Table(
        title=f"texts of {options.tokens} tokens on {options.device}: one by one, and in a batch of 16 with drafts"
    )
    for column in ("dtype", "T", "texts", "differ", "margin at first difference", "close calls per text", "seconds"):
        table.add_column(column, justify="right")
    for dtype, further in TEXT_TARGETS[torch.device(options.device).type]:
        target = Target(FAMILY / "target-v1", device=options.device, dtype=getattr(torch, dtype), **further)
        for temperature in (0.0, 1.0):
            jobs = make_family_jobs(5, temperature)
            reference = [new for new, _ in asyncio.run(generate_texts(target, jobs, options.tokens, 0, 1))[0]]
            results, seconds = asyncio.run(generate_texts(target, jobs, options.tokens, 5, 16, reference))
            margins = []
            for (prompt, _), (new, calls), correct in zip(jobs, results, reference, strict=True):
                index = next((i for i, (a, b) in enumerate(zip(new, correct, strict=True)) if a != b), None)
                if index is not None:
                    margins.append(dict(calls).get(len(prompt) + index, float("inf")))
            shown = f"{min(margins):.3f} to {max(margins):.3f}" if margins else ""
            close = sum(len(calls) for _, calls in results) / len(results)
            name = ", ".join([dtype, *(f"{option}={value}" for option, value in further.items())])
            table.add_row(
                name, f"{temperature:g}", str(len(jobs)), str(len(margins)), shown, f"{close:.1f}", f"{seconds:.1f}"
            )
    report(table, options)


def _tokens_and_count(text: str) -> tuple[int, int]:
    tokens, _, count = text.partition("x")
    return int(tokens), int(count or 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("forwards")
    command.add_argument("--shape", nargs="+", default=["7B", "32B"], choices=SHAPES)
    command.add_argument("--sessions", nargs="+", type=int, default=[1, 16, 64])
    command.add_argument("--draft", nargs="+", type=int, default=[0, 5, 16])
    command.add_argument("--context", nargs="+", type=int, default=[512])
    command.add_argument("--exact", action="store_true")
    command.add_argument("--compiled", action="store_true")
    command.add_argument("--quantize", choices=METHODS, help="the floor is still that of bfloat16")
    command.add_argument("--kv-cache-dtype", choices=CACHE_FORMATS, help="the floor is that of this cache")
    command.add_argument("--static", action="store_true", help="compile each number of rows for itself")
    text = "an option of torch's compiler, such as coordinate_descent_tuning=1"
    command.add_argument("--inductor", nargs="+", default=[], metavar="NAME=0|1", help=text)
    command.add_argument("--profile", action="store_true", help="print the CUDA time of a forward by kernel")
    command.set_defaults(run=forwards)
    command = commands.add_parser("prefill")
    command.add_argument("--shape", nargs="+", default=["7B"], choices=SHAPES)
    command.add_argument("--compiled", action="store_true")
    text = "tokens of a prompt, and how many of them at once"
    default = [(512, 1), (2048, 1), (8192, 1), (16384, 1), (2048, 16)]
    command.add_argument("--prompts", nargs="+", type=_tokens_and_count, default=default, metavar="NxM", help=text)
    command.set_defaults(run=prefill)
    command = commands.add_parser("serving")
    command.add_argument("--shape", nargs=1, default=["7B"], choices=SHAPES)
    command.add_argument("--compiled", action="store_true")
    command.add_argument("--streams", nargs="+", type=int, default=STREAMS)
    command.add_argument("--tokens", type=int, default=STREAM_TOKENS)
    command.add_argument("--prompt", type=int, default=STREAM_PROMPT)
    command.add_argument("--long-prompt", type=int, default=LONG_PROMPT)
    command.set_defaults(run=serving)
    for command in commands.choices.values():
        command.add_argument("--json", type=Path, help="add the table, as one JSON line, to this file")
    for name, run in (("sharing", sharing), ("texts", texts)):
        command = commands.add_parser(name)
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--dtype", default="float32")
        command.add_argument("--tokens", type=int, default=128)
        command.add_argument("--json", type=Path, help="add the table, as one JSON line, to this file")
        command.set_defaults(run=run)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
