"""One forward over segments of many sequences: visibility, rollback, LoRA adapters, and independence of the batch."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cloud_verifier.model.batch import Segment
from cloud_verifier.model.kv_cache import CachedSequence, KVCachePool
from cloud_verifier.model.target import Target, load_model
from cloud_verifier.model.tree import TokenTree
from edge_runtime.protocol.errors import TargetError
from edge_runtime.protocol.sampling import Sampling
from tests.models import VOCABULARY_SIZE, save_target

# Windows and chunks are shorter than the texts here.
MIXED = ["sliding_attention", "full_attention"]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "gpt_oss": EXPERTS | {"sliding_window": 5},
    "cohere2": {"sliding_window": 2, "layer_types": MIXED},
    "llama4_text": EXPERTS | {"attention_chunk_size": 4, "attn_temperature_tuning": False, "num_hidden_layers": 4},
    "deepseek_v2": {
        "head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
        "v_head_dim": 12, "num_key_value_heads": 4, "first_k_dense_replace": 2,
    },
    # Its layers call scaled_dot_product_attention themselves (transformers 4).
    "stablelm": {},
}  # fmt: skip
TEXT = [17, 30, 205, 9, 77, 150, 3]
GREEDY = Sampling()


class LoadedTarget(NamedTuple):
    """A target with a pool, and the same model with transformers' own attention as the reference."""

    target: Target
    model: Any
    pool: KVCachePool

    def reference_logits(self, ids: list[int]) -> torch.Tensor:
        """(V,) logits after `ids`, from one plain causal forward."""
        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([ids])).logits[0, -1].float()

    def new_sequence(self, ids: list[int]) -> CachedSequence:
        sequence = CachedSequence()
        self.prefill(sequence, ids)
        return sequence

    def prefill(self, sequence: CachedSequence, ids: list[int]) -> None:
        self.target.run(self.pool, [self.target.prefill_segment(sequence, ids)])
        self.pool.keep(sequence, list(range(len(ids))))

    def score(self, tree: TokenTree, sequence: CachedSequence) -> torch.Tensor:
        """(nodes, V) logits of the tree after the sequence."""
        return self.target.runner.logits(self.pool, [self.target.tree_segment(sequence, tree)])[0]


def load_with_reference(path: Path) -> LoadedTarget:
    target = Target(path, device="cpu", dtype=torch.float32)
    return LoadedTarget(target, load_model(path, "cpu", "float32")[0], KVCachePool(target.runner.shape, 0))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedTarget:
    path = tmp_path_factory.mktemp("models") / request.param
    loaded = load_with_reference(save_target(path, request.param, **ARCHITECTURES[request.param]))
    assert not loaded.target.general_tier_reason
    return loaded


@pytest.fixture(scope="module")
def tiny_loaded(tiny_path: Path) -> LoadedTarget:
    return load_with_reference(tiny_path)


def assert_equal_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draft", "siblings"),
    [
        ([], {}),
        ([11, 12, 13], {}),
        ([11, 12, 13, 14], {0: [40, 41], 1: [42], 3: [11, 12, 43]}),
        ([5] * 20, {index: [60 + index, 90 + index] for index in range(20)}),
    ],
    ids=["empty", "chain", "tree", "large"],
)
def test_a_tree_in_one_forward_equals_separate_forwards_of_its_paths(
    loaded: LoadedTarget, draft: list[int], siblings: dict[int, list[int]]
) -> None:
    tree = TokenTree(TEXT[-1], len(TEXT), draft, siblings)
    logits = loaded.score(tree, loaded.new_sequence(TEXT[:-1]))
    assert logits.shape == (len(tree), VOCABULARY_SIZE)
    before = TEXT[:-1]
    chain = [TEXT[-1], *draft]
    for row in range(len(chain)):
        assert_equal_logits(logits[row], loaded.reference_logits([*before, *chain[: row + 1]]))
    row = len(chain)
    for index, alternatives in sorted(siblings.items()):
        for token in alternatives:
            assert_equal_logits(logits[row], loaded.reference_logits([*before, *chain[: index + 1], token]))
            row += 1
    assert row == len(tree)


@pytest.mark.parametrize("rows", [[], [0], [0, 1, 2], [0, 1, 5], [0, 4]], ids=str)
def test_rollback_leaves_only_the_kept_rows(loaded: LoadedTarget, rows: list[int]) -> None:
    tree = TokenTree(TEXT[-1], len(TEXT), [11, 12, 13], {0: [40], 1: [42]})
    sequence = loaded.new_sequence(TEXT[:-1])
    loaded.score(tree, sequence)
    loaded.pool.keep(sequence, rows)
    ids = TEXT[:-1] + [tree.ids[row] for row in rows]
    assert sequence.length == len(ids)
    logits = loaded.score(TokenTree(99, len(ids) + 1, [98], {}), sequence)
    assert_equal_logits(logits[1], loaded.reference_logits([*ids, 99, 98]))


@pytest.mark.parametrize("length", [1, 8, 9, 73, 256, 500])
def test_chunked_prefill_equals_one_forward(tiny_loaded: LoadedTarget, length: int) -> None:
    ids = [(31 * index + 7) % VOCABULARY_SIZE for index in range(length)]
    sequence, remaining, random = CachedSequence(), ids, Random(length)
    while remaining:
        count = random.randint(1, 200)
        tiny_loaded.prefill(sequence, remaining[:count])
        remaining = remaining[count:]
    assert sequence.length == length
    logits = tiny_loaded.score(TokenTree(5, length + 1, [], {}), sequence)
    assert_equal_logits(logits[0], tiny_loaded.reference_logits([*ids, 5]))


@pytest.mark.parametrize("window", [0, 100, 700], ids=lambda window: f"window {window}" if window else "full")
def test_sequences_longer_than_a_page(tmp_path: Path, window: int) -> None:
    options = {"model_type": "mistral", "sliding_window": window} if window else {}
    loaded = load_with_reference(save_target(tmp_path / "long", max_position_embeddings=2048, **options))
    page = loaded.pool.page_tokens
    ids = [(31 * index + 7) % VOCABULARY_SIZE for index in range(2 * page + 90)]
    sequence = loaded.new_sequence(ids[: page - 3])
    other = loaded.new_sequence(ids[5:20])
    # Prefill, scoring and rollback across a page boundary.
    tree = TokenTree(ids[page - 3], page - 2, ids[page - 2 : page + 4], {1: [40], 4: [41]})
    logits = loaded.score(tree, sequence)
    assert_equal_logits(logits[6], loaded.reference_logits(ids[: page + 4]))
    loaded.pool.keep(sequence, [0, 1, 2, 3, 4, 8])
    text = [*ids[: page + 2], 41]
    logits = loaded.score(TokenTree(7, page + 4, [], {}), sequence)
    assert_equal_logits(logits[0], loaded.reference_logits([*text, 7]))
    loaded.pool.keep(sequence, [])
    loaded.prefill(sequence, ids[len(text) :])
    text += ids[len(text) :]
    logits = loaded.score(TokenTree(9, len(text) + 1, [], {}), sequence)
    assert_equal_logits(logits[0], loaded.reference_logits([*text, 9]))
    assert len(sequence.pages) == 3
    before = loaded.pool.used_pages
    loaded.pool.release(sequence)
    assert (loaded.pool.used_pages, sequence.length) == (before - 3, 0)
    logits = loaded.score(TokenTree(9, 16, [], {}), other)
    assert_equal_logits(logits[0], loaded.reference_logits([*ids[5:20], 9]))


@pytest.mark.slow
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32))
def test_sequences_in_one_forward_do_not_influence_each_other(tiny_loaded: LoadedTarget, seed: int) -> None:
    """Sequences come and go, are prefilled in chunks, drafted for and rolled back; each as if it were alone."""
    random = Random(seed)
    target = tiny_loaded.target
    pool = KVCachePool(target.runner.shape, 0)
    texts: list[tuple[CachedSequence, list[int]]] = []
    for _ in range(random.randint(3, 8)):
        if texts and random.random() < 0.3:
            pool.release(texts.pop(random.randrange(len(texts)))[0])
        texts += [(CachedSequence(), []) for _ in range(random.randint(0, 2))]
        segments: list[Segment] = []
        for sequence, _ in texts:
            ids = [random.randrange(VOCABULARY_SIZE) for _ in range(random.randint(1, 12))]
            if random.random() < 0.3:
                segments.append(target.prefill_segment(sequence, ids))
            else:
                siblings = {
                    i: [random.randrange(VOCABULARY_SIZE)] for i in range(len(ids) - 1) if random.random() < 0.4
                }
                tree = TokenTree(ids[0], sequence.length + 1, ids[1:], siblings)
                segments.append(target.tree_segment(sequence, tree))
        if not segments:
            continue
        logits = iter(target.runner.logits(pool, segments))
        for (sequence, ids), segment in zip(texts, segments, strict=True):
            if segment.sampling:
                row = random.randrange(len(segment))
                prefix = segment.visible_prefix[row]
                expected = tiny_loaded.reference_logits([*ids, *segment.ids[:prefix], segment.ids[row]])
                assert_equal_logits(next(logits)[row], expected)
                kept = [*range(prefix), row]
            else:
                kept = list(range(len(segment)))
            pool.keep(sequence, kept)
            ids += [segment.ids[index] for index in kept]


def test_pages_are_reserved_and_released(tiny_loaded: LoadedTarget) -> None:
    pool = KVCachePool(tiny_loaded.target.runner.shape, 0)
    assert pool.used_pages == 0
    sequence = CachedSequence()
    pool.reserve(sequence, 1)
    assert (pool.used_pages, len(sequence.pages)) == (1, 1)
    pool.release(sequence)
    assert pool.used_pages == 0


def save_lora_adapter(base: Path, path: Path, seed: int, **options: Any) -> Path:
    """Save a LoRA adapter of `base` with random weights."""
    torch.manual_seed(seed)
    settings = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "up_proj"]}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings | options))
    model.save_pretrained(path)
    return path


def load_sharing(base: Target, path: Path) -> Target:
    """Load the version at `path` so that it shares memory with `base`."""
    target = Target(path, device="cpu", dtype=torch.float32, share_with=[base])
    target.attach_adapter()
    return target


def test_versions_of_one_base_share_its_weights_and_a_forward(tiny_path: Path, tmp_path: Path) -> None:
    base = Target(tiny_path, device="cpu", dtype=torch.float32)
    paths = [
        save_lora_adapter(tiny_path, tmp_path / "one", 1),
        save_lora_adapter(tiny_path, tmp_path / "two", 2, r=7, target_modules=["down_proj", "k_proj"], use_rslora=True),
        save_lora_adapter(tiny_path, tmp_path / "three", 3, layers_to_transform=[1]),
    ]
    targets = [base, *(load_sharing(base, path) for path in paths)]
    references = [load_model(path, "cpu", "float32")[0] for path in (tiny_path, *paths)]
    assert {id(target.runner) for target in targets} == {id(base.runner)}
    assert [target.adapter_slot for target in targets] == [0, 1, 2, 3]

    def check_forward(versions: list[int]) -> None:
        pool, sequences = KVCachePool(base.runner.shape, 0), [CachedSequence() for _ in targets]
        tree = TokenTree(TEXT[-1], len(TEXT), [11, 12], {0: [40]})
        base.run(pool, [targets[i].prefill_segment(sequences[i], TEXT[:-1]) for i in versions])
        for i in versions:
            pool.keep(sequences[i], list(range(len(TEXT) - 1)))
        logits = base.runner.logits(pool, [targets[i].tree_segment(sequences[i], tree) for i in versions])
        for i, actual in zip(versions, logits, strict=True):
            with torch.inference_mode():
                expected = references[i](input_ids=torch.tensor([[*TEXT, 11, 12]])).logits[0, -1]
            assert_equal_logits(actual[2], expected)

    check_forward([0, 1, 2, 3])
    targets[2].detach_adapter()
    check_forward([3, 0, 1])
    # The slot is free again.
    targets[2] = load_sharing(base, paths[1])
    assert targets[2].adapter_slot == 2
    check_forward([2, 1, 0, 3])
    for target in targets[1:]:
        target.detach_adapter()
    check_forward([0])
    assert not any(module._forward_hooks for module in base.runner.model.modules())


def test_fifty_adapters_come_and_go_without_moving_the_others(tiny_path: Path) -> None:
    base, (reference, *_) = (
        Target(tiny_path, device="cpu", dtype=torch.float32),
        load_model(tiny_path, "cpu", "float32"),
    )
    adapters, name = base.runner.adapters, "model.layers.0.self_attn.q_proj"
    weight = reference.get_submodule(name).weight
    unchanged = weight.detach().clone()
    generator = torch.Generator().manual_seed(1)
    matrices = [
        (
            torch.randn(4, unchanged.shape[1], generator=generator),
            torch.randn(unchanged.shape[0], 4, generator=generator),
        )
        for _ in range(60)
    ]
    # By slot.
    held = {adapters.add({name: pair}): pair for pair in matrices[:50]}
    assert list(held) == list(range(1, 51))
    # Room doubles.
    assert adapters.layout_version <= 7
    layout = adapters.layout_version
    for slot, pair in zip([7, 50, 1, 23, 49, 8, 9, 10, 11, 12], matrices[50:], strict=True):
        adapters.remove(slot)
        del held[slot]
        assert adapters.add({name: pair}) == slot
        held[slot] = pair
    adapters.remove(33)
    del held[33]
    assert adapters.layout_version == layout
    pool, tree = KVCachePool(base.runner.shape, 0), TokenTree(TEXT[0], 1, TEXT[1:], {})
    slots = [0, 1, 7, 22, 33, 50]
    segments = [Segment.from_tree(CachedSequence(), tree, GREEDY, slot) for slot in slots]
    for slot, logits in zip(slots, base.runner.logits(pool, segments), strict=True):
        with torch.inference_mode():
            down, up = held.get(slot, (torch.zeros(4, unchanged.shape[1]), torch.zeros(unchanged.shape[0], 4)))
            weight.copy_(unchanged + up @ down)
            expected = reference(input_ids=torch.tensor([TEXT])).logits[0]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    for slot in held:
        adapters.remove(slot)
    assert len(adapters) == 0
    assert not any(module._forward_hooks for module in base.runner.model.modules())


def test_adapters_share_a_base_that_is_not_served_itself(tiny: Target, tiny_path: Path, tmp_path: Path) -> None:
    paths = [save_lora_adapter(tiny_path, tmp_path / f"adapter-{seed}", seed) for seed in (1, 2)]
    first = Target(paths[0], device="cpu", dtype=torch.float32, share_with=[])
    second = Target(paths[1], device="cpu", dtype=torch.float32, share_with=[first])
    base = Target(tiny_path, device="cpu", dtype=torch.float32, name="base", share_with=[first, second])
    assert first.runner is second.runner is base.runner
    assert base.version == f"base@{tiny.version.partition('@')[2]}"
    for target in (first, second, base):
        target.attach_adapter()
    assert [first.adapter_slot, second.adapter_slot, base.adapter_slot] == [1, 2, 0]


def test_a_version_that_is_not_plain_lora_shares_the_tensors_that_it_kept(tiny_path: Path, tmp_path: Path) -> None:
    base = Target(tiny_path, device="cpu", dtype=torch.float32)
    options = {"use_dora": True, "layers_to_transform": [0], "target_modules": ["q_proj"]}
    tuned = load_sharing(base, save_lora_adapter(tiny_path, tmp_path / "dora", 1, **options))
    assert tuned.runner is not base.runner
    tuned_parameters = dict(tuned.runner.model.named_parameters())
    base_parameters = dict(base.runner.model.named_parameters())
    assert [name for name in base_parameters if tuned_parameters[name] is not base_parameters[name]] == [
        "model.layers.0.self_attn.q_proj.weight"
    ]


def test_an_adapter_that_does_not_fit_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    base = Target(tiny_path, device="cpu", dtype=torch.float32)
    path = save_lora_adapter(tiny_path, tmp_path / "tuned", 1)
    (path / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(TargetError, match=str(path)):
        load_sharing(base, path)
    assert len(base.runner.adapters) == 0


def test_tree_segments_are_greedy_by_default(tiny_loaded: LoadedTarget) -> None:
    segment = tiny_loaded.target.tree_segment(CachedSequence(), TokenTree(1, 1, [], {}))
    assert segment.sampling is not None
    assert segment.sampling.parameters == GREEDY
