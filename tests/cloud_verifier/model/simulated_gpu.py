"""The GPU runner and its kernels without a GPU: `python -m tests.cloud_verifier.model.simulated_gpu CASE ...`.

Triton's interpreter runs the kernels on a CPU, and a few functions of `torch.cuda` do nothing. What CUDA itself does is
left out: graphs, streams, and bfloat16, whose products the interpreter gets wrong. In a process of its own, because
Triton reads its environment when it is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"

import torch
from transformers import AttentionInterface

from cloud_verifier.model import attention, cuda_graphs, fast_tier, graph_attention, quantization, self_test
from cloud_verifier.model.batch import Segment, do_nothing
from cloud_verifier.model.cuda_graphs import GraphRunner
from cloud_verifier.model.fused_projections import ProjectionFusion
from cloud_verifier.model.graph_attention import GraphContext
from cloud_verifier.model.kv_cache import CACHE_FORMATS, PAGE_TOKENS, CachedSequence, KVCachePool, KVCacheShape
from cloud_verifier.model.runner import TargetRunner
from cloud_verifier.model.sampling import SamplingBatch, sample_tokens
from cloud_verifier.model.sampling_kernel import sample_plain
from cloud_verifier.model.target import load_model, make_runner
from cloud_verifier.model.tree import TokenTree
from edge_runtime.protocol.sampling import Sampling
from tests.benchmarks import kernels
from tests.cloud_verifier.model.architectures import save_architecture
from tests.models import save_target

CONTEXT = 1024
# Texts in one forward. Chosen: more than a power of two.
MANY_TEXTS = 132
# The interpreter takes as long as there are heads.
SMALL = {"num_attention_heads": 2, "num_key_value_heads": 1}
# Text of the self-test: in float16 long enough for two chunks of a prompt through the flash kernel's path, else for
# several pages.
TEXT_TOKENS = {"float16": 680, "float32": 150}


class SimulatedPool(KVCachePool):
    """A pool as on a GPU, in one piece. What was never written is no number."""

    def __init__(self, shape: KVCacheShape, tokens: int) -> None:
        super().__init__(shape, tokens)
        self.preallocated, self.page_tokens = True, PAGE_TOKENS["cuda"]
        self.capacity_pages = -(-tokens // self.page_tokens) + 8
        size = (self.capacity_pages + 1, shape.layers, 2, shape.heads, self.page_tokens, shape.head_size)
        self.slabs = [torch.full(size, torch.nan, dtype=shape.dtype)]
        self._free = list(range(self.capacity_pages, 0, -1))


def simulate() -> None:
    """Let the GPU's code run on the CPU, in this process."""
    cuda: Any = torch.cuda
    cuda.device = lambda _: contextlib.nullcontext()
    cuda.synchronize = lambda *_: None
    cuda.Event = lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    cuda.current_stream = lambda *_: SimpleNamespace(synchronize=lambda: None)
    tensor_class: Any = torch.Tensor
    tensor_class.pin_memory = lambda tensor, *_: tensor
    torch.library.impl(graph_attention._OPERATORS, "attend", "CPU")(graph_attention._attend)
    attend_on_cpu: Callable[..., Any] = attention.attend

    def attend(layer: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        if not isinstance(attention.get_forward_context(), GraphContext):
            return attend_on_cpu(layer, query, key, value, mask, **options)
        names = ("scaling", "softcap", "s_aux")
        attended = attention.attend_on_gpu(layer, query, key, value, **{name: options.get(name) for name in names})
        return attended, None

    AttentionInterface.register(attention.IMPLEMENTATION_NAME, attend)
    for module, name, value in (
        (fast_tier, "attend", attend),
        (self_test, "KVCachePool", SimulatedPool),
    ):
        setattr(module, name, value)


def make_simulated_runner(
    path: Path, dtype: str, *, exact: bool = False, cache_format: str = "", quantized: bool = False
) -> GraphRunner:
    """The GPU's runner of the checkpoint at `path`, after its self-test."""
    model = load_model(path, "cpu", dtype)[0]
    if quantized:
        with patch.object(quantization, "_check_device"):
            quantization.quantize_layers(model, "fp8")
    paged = fast_tier.PagedAttention(model)
    self_test.TEXT_TOKENS = TEXT_TOKENS[dtype]
    dtype_of_cache = CACHE_FORMATS.get(cache_format)
    test = self_test.SelfTest(model, paged, CONTEXT, dtype_of_cache)
    with paged.suspended():
        fusion = ProjectionFusion(model)
    runner = GraphRunner(model, paged, CONTEXT, exact=exact, fusion=fusion)
    runner._mode = "forward"
    if dtype_of_cache:
        runner.round_cache(dtype_of_cache)
    # It compares logits. To sample from them as well takes half of the time, row by row; `check_tokens` does.
    with patch.object(cuda_graphs, "sample_plain", lambda logits, inputs, rows: torch.zeros(2, len(logits))):
        test.run(runner)
    return runner


def check_self_test(directory: Path, model_type: str, dtype: str, option: str = "") -> None:
    """The runner's logits are those of transformers.

    Args:
        option: `exact`, a format of the KV cache, or `quantized` to fp8.
    """
    path = save_architecture(directory / "model", model_type, max_position_embeddings=CONTEXT, **SMALL)
    cache_format = option if option in CACHE_FORMATS else ""
    quantized = option == "quantized"
    make_simulated_runner(
        path, dtype, exact=bool(option) and not quantized, cache_format=cache_format, quantized=quantized
    )


def check_tokens(directory: Path) -> None:
    """The sampled tokens of rounds and chunks in one forward are those of the CPU's runner, one by one."""
    path, dtype = save_target(directory / "model", "llama", max_position_embeddings=CONTEXT, **SMALL), "float16"
    generator = torch.Generator().manual_seed(5)
    gpu = make_simulated_runner(path, dtype)
    cpu = make_runner(load_model(path, "cpu", dtype)[0], CONTEXT)

    def draw(count: int) -> list[int]:
        return torch.randint(cpu.model.config.vocab_size, (count,), generator=generator).tolist()

    texts, drafts = [draw(count) for count in (40, 70, 520, 9)], [draw(count) for count in (5, 0, 3, 2)]
    samplings = [Sampling(0.7, seed=3), Sampling(), Sampling(1.0, seed=9, top_p=0.9), Sampling(0.8, seed=1, top_k=20)]
    results = []
    for runner, pool in ((gpu, SimulatedPool(gpu.shape, 8000)), (cpu, KVCachePool(cpu.shape, 8000))):
        sequences = [CachedSequence() for _ in texts]

        def chunk(index: int, sequences: list[CachedSequence] = sequences) -> Segment:
            return Segment.from_tokens(sequences[index], texts[index])

        def tree(
            index: int, sequences: list[CachedSequence] = sequences, siblings: Any = None, logprobs: int = 0
        ) -> Segment:
            sequence = sequences[index]
            nodes = TokenTree(7, sequence.length + 1, drafts[index], siblings or {})
            return Segment.from_tree(sequence, nodes, samplings[index], logprobs=logprobs)

        # Chunks alone, a long one beside rounds, a short one beside a round, and rounds.
        results.append(
            [
                *run(runner, pool, [chunk(0), chunk(1)]),
                *run(runner, pool, [tree(0, siblings={1: [3, 4]}), chunk(2), tree(1)]),
                *run(runner, pool, [chunk(3), tree(2, logprobs=2)]),
                *run(runner, pool, [tree(index) for index in range(4)]),
            ]
        )
    assert len(results[0]) == 27
    for actual, expected in zip(*results, strict=True):
        assert actual[0] == expected[0], (actual, expected)
        assert abs(actual[1] - expected[1]) < 0.2, (actual, expected)


def check_ahead(directory: Path) -> None:
    """Streams have the tokens of the CPU's runner where forwards are launched before their tokens are known."""
    path = save_target(directory / "model", "llama", max_position_embeddings=CONTEXT, num_hidden_layers=1, **SMALL)
    gpu = make_simulated_runner(path, "float32")
    cpu = make_runner(load_model(path, "cpu", "float32")[0], CONTEXT)
    assert gpu.runs_ahead and not cpu.runs_ahead
    # By forward: the streams in it, and whether all go on. One ends, one joins, one gets another sampling.
    forwards = [((0, 1, 2), True)] * 3 + [((0, 2), True), ((2, 0), True), ((0, 1, 2), True), ((0, 2), False)] * 2
    # The second text fills its page, and the next one begins within a forward that was launched ahead.
    prompts = [[5, 9], list(range(1, 63)), [7]]
    reused = []
    texts: list[list[list[int]]] = []
    for runner in (gpu, cpu):
        pool = (SimulatedPool if runner is gpu else KVCachePool)(runner.shape, 2000)
        texts.append([list(prompt) for prompt in prompts])
        samplings = [Sampling(0.7, seed=seed) for seed in range(3)]
        sequences = [CachedSequence() for _ in prompts]
        run(runner, pool, [Segment.from_tokens(sequences[i], prompts[i][:-1]) for i in (0, 1)])
        for number, (streams, continues) in enumerate(forwards):
            if number == 8:
                samplings[0] = Sampling(0.9, seed=1)
            trees = [TokenTree(texts[-1][i][-1], len(texts[-1][i]), [], {}) for i in streams]
            segments = [
                Segment.from_tree(sequences[i], tree, samplings[i]) for i, tree in zip(streams, trees, strict=True)
            ]
            if runner is gpu:
                launched = gpu._ahead
                sampled = gpu.run(pool, segments, do_nothing, continues)
                assert (gpu._ahead is not None) == continues
                reused.append(launched is not None and launched.rows_of(pool, segments) is not None)
            else:
                sampled = [tokens for segment in segments for tokens in cpu.run(pool, [segment])]
            for i, tokens in zip(streams, sampled, strict=True):
                assert tokens is not None
                texts[-1][i].append(tokens[0].token)
                pool.keep(sequences[i], [0])
    assert texts[0] == texts[1]
    assert reused == [False, True, True, True, True, False, True, False, False, False, True]


def check_many_texts(directory: Path) -> None:
    """More texts than a forward had room for once get the tokens of the CPU's runner in one forward."""
    sizes = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    path = save_target(directory / "model", "llama", max_position_embeddings=CONTEXT, **sizes)
    runners = make_simulated_runner(path, "float32"), make_runner(load_model(path, "cpu", "float32")[0], CONTEXT)
    results = []
    for runner in runners:
        pool = (SimulatedPool if isinstance(runner, GraphRunner) else KVCachePool)(runner.shape, 64 * MANY_TEXTS)
        sequences = [CachedSequence() for _ in range(MANY_TEXTS)]
        run(runner, pool, [Segment.from_tokens(each, [index]) for index, each in enumerate(sequences)])
        trees = [TokenTree(9, 2, [index % 5] * (index % 2), {}) for index in range(MANY_TEXTS)]
        pairs = zip(sequences, trees, strict=True)
        segments = [Segment.from_tree(*pair, Sampling(0.7, seed=index)) for index, pair in enumerate(pairs)]
        assert len(segments) <= runner.max_segments
        results.append(run(runner, pool, segments))
    assert [token for token, _ in results[0]] == [token for token, _ in results[1]]


def run(runner: TargetRunner, pool: KVCachePool, segments: Sequence[Segment]) -> list[tuple[int, float]]:
    """Tokens and margins after the rows of sampled segments: in one forward on the simulated GPU, else one by one."""
    parts = [segments] if isinstance(runner, GraphRunner) else [[segment] for segment in segments]
    sampled = [each for part in parts for each in runner.run(pool, part)]
    for segment in segments:
        if segment.keep_all:
            pool.keep(segment.sequence, list(range(len(segment))))
    rows: list[tuple[int, float]] = []
    for segment, tokens in zip(segments, sampled, strict=True):
        assert (tokens is None) == (segment.sampling is None)
        if tokens is not None:
            rows += [tokens[row][:2] for row in range(len(segment))]
    return rows


def check_sampling(_: Path) -> None:
    """The kernel gives the tokens and margins of `sample_tokens`, to the last bit."""
    positions = torch.tensor([3, 0, 77, 100_000, 5, 6], dtype=torch.int32)
    samplings = [Sampling(seed=1), Sampling(), *(Sampling(T, seed=s) for T, s in ((0.7, 2**64 - 5), (1.3, 3), (2, 1)))]
    samplings.append(Sampling(1e-3, seed=8))
    generator = torch.Generator().manual_seed(2)
    for vocabulary in (2, 512, 5000):
        for dtype in (torch.float32, torch.bfloat16):
            logits = (torch.randn(len(samplings), vocabulary, generator=generator) * 3).to(dtype)
            # Equal logits, of which the first counts.
            logits[1, vocabulary // 2 :] = logits[1].max()
            pairs = [(each, [int(position) + 1]) for each, position in zip(samplings, positions, strict=True)]
            batch = SamplingBatch.from_segments(pairs, torch.device("cpu"))
            inputs: Any = SimpleNamespace(positions=positions, seeds=batch.seeds, temperatures=batch.temperatures)
            expected = sample_tokens(logits, batch)
            assert torch.equal(sample_plain(logits, inputs), expected)
            rows = torch.tensor([4, 1, 2])
            assert torch.equal(sample_plain(logits[rows], inputs, rows), expected[:, rows])


def check_attention(_: Path) -> None:
    """The attention kernels give what PyTorch gives step by step, with and without spans to combine."""
    cases = {case.name: case for case in kernels.CASES}
    for name in ("no groups, odd size", "sinks and window (gpt-oss)", "sinks, full", "chunks (Llama 4)"):
        for lengths, context, span in (((0, 1, 63, 130), 512, None), ((0, 1, 700), 1024, 128)):
            error = kernels.measure_error(
                cases[name], lengths, context, device="cpu", dtype=torch.float32, chunks=0, longest_span=span
            )
            assert error <= kernels.TOLERANCE["float32"], (name, error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "tokens, ahead, many-texts, sampling, attention, or self-test:MODEL_TYPE:DTYPE[:exact|:fp8|:quantized]"
    parser.add_argument("cases", nargs="+", metavar="CASE", help=text)
    options = parser.parse_args()
    checks: dict[str, Callable[..., None]] = {
        "self-test": check_self_test,
        "tokens": check_tokens,
        "ahead": check_ahead,
        "many-texts": check_many_texts,
        "sampling": check_sampling,
        "attention": check_attention,
    }
    simulate()
    for case in options.cases:
        name, *arguments = case.split(":")
        with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
            checks[name](Path(directory), *arguments)
        print(f"{case}: right", flush=True)


if __name__ == "__main__":
    sys.exit(main())
