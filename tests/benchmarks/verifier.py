"""Cost of verification: `python -m tests.benchmarks.verifier forwards|sharing|texts`.

forwards   on CUDA: one round of many sessions on models of real shapes with random weights, relative to the floor of
           reading weights and KV cache once
sharing    tokens per second of the shipped family with 16 sessions in one batch, and one by one
texts      how often a text depends on the batch, the margins at the first difference, and the cost of `exact`
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import statistics
import time
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from cloud_verifier.engine.scheduler import Scheduler
from cloud_verifier.engine.sessions import RoundReply, Session
from cloud_verifier.model.batch import Segment
from cloud_verifier.model.kv_cache import CachedSequence, KVCachePool
from cloud_verifier.model.target import Target, make_runner
from cloud_verifier.model.tree import TokenTree
from edge_runtime.protocol.messages import PROTOCOL_VERSION, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from tests.toy_family import FAMILY

SHAPES: dict[str, dict[str, int]] = {
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
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, tie_word_embeddings=False)
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
    source = torch.empty(1 << 30, dtype=torch.int64, device="cuda")
    copy = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        copy.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(seconds)


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


def median_ms(work: Any, repeats: int = 30) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds)


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
    gpus = f"{group.size if group else 1} x {torch.cuda.get_device_name()}"
    variant = "".join(f", {name}" for name in ("exact", "compiled") if getattr(options, name))
    table = Table(title=f"one round, context {options.context}, bfloat16, {gpus}{variant}")
    for column in (
        "shape",
        "sessions",
        "K",
        "round, ms",
        "floor, ms",
        "round / floor",
        "goal, ms",
    ):
        table.add_column(column, justify="right")
    for shape in options.shape:
        model = make_random_model(shape, "cuda")
        runner = make_runner(model, 4096, exact=options.exact, compiled=options.compiled, group=group)
        local = [value._local_tensor if hasattr(value, "_local_tensor") else value for value in model.parameters()]
        weights = sum(value.nbytes for value in local) - model.get_input_embeddings().weight.nbytes
        pool = KVCachePool(runner.shape, max(options.sessions) * (options.context + 160))
        if group and group.rank:
            runner.follow_leader(pool)
            continue
        for sessions in options.sessions:
            for draft in options.draft:
                segments = make_rounds(pool, sessions, draft, options.context)
                if sum(map(len, segments)) > runner.max_rows:
                    continue
                started = time.perf_counter()
                runner.run(pool, segments)
                ready = time.perf_counter() - started
                print(f"{shape}, {sessions} sessions, K={draft}: ready in {ready:.1f} s", flush=True)
                round_ms = median_ms(functools.partial(runner.run, pool, segments))
                if options.profile:
                    profile(functools.partial(runner.run, pool, segments))
                cache = sessions * options.context * runner.shape.bytes_per_token
                floor = 1e3 * (weights + cache) / speed
                goal, naive = GOALS.get((shape, sessions), (None, None)) if draft == 5 else (None, None)
                goal_text = f"{goal} (naive graph {naive})" if goal else ""
                row = (str(sessions), str(draft), f"{round_ms:.2f}", f"{floor:.2f}", f"{round_ms / floor:.2f}")
                table.add_row(shape, *row, goal_text)
                for segment in segments:
                    pool.release(segment.sequence)
        if group:
            group.stop_followers()
        del runner, model, pool, local
        torch.cuda.empty_cache()
    if group and group.rank:
        return
    Console(width=120).print(table)
    print(f"memory bandwidth: {speed / 1e12:.2f} TB/s (a copy, reads and writes counted)")


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
    engine.start()
    while engine.target is None:
        if engine.failure:
            raise engine.failure
        await asyncio.sleep(0.01)
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
    Console(width=120).print(table)


def texts(options: argparse.Namespace) -> None:
    table = Table(
        title=f"texts of {options.tokens} tokens on {options.device}: one by one, and in a batch of 16 with drafts"
    )
    for column in ("dtype", "T", "texts", "differ", "margin at first difference", "close calls per text", "seconds"):
        table.add_column(column, justify="right")
    for dtype, exact in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        if exact and options.device == "cpu":
            continue
        target = Target(FAMILY / "target-v1", device=options.device, dtype=getattr(torch, dtype), exact=exact)
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
            name = f"{dtype}, exact" if exact else dtype
            table.add_row(
                name, f"{temperature:g}", str(len(jobs)), str(len(margins)), shown, f"{close:.1f}", f"{seconds:.1f}"
            )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("forwards")
    command.add_argument("--shape", nargs="+", default=["7B", "32B"], choices=SHAPES)
    command.add_argument("--sessions", nargs="+", type=int, default=[1, 16, 64])
    command.add_argument("--draft", nargs="+", type=int, default=[0, 5, 16])
    command.add_argument("--context", type=int, default=512)
    command.add_argument("--exact", action="store_true")
    command.add_argument("--compiled", action="store_true")
    command.add_argument("--profile", action="store_true", help="print the CUDA time of a forward by kernel")
    command.set_defaults(run=forwards)
    for name, run in (("sharing", sharing), ("texts", texts)):
        command = commands.add_parser(name)
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--dtype", default="float32")
        command.add_argument("--tokens", type=int, default=128)
        command.set_defaults(run=run)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
