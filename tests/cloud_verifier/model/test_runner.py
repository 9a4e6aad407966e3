"""One forward over pieces of many texts: what each sees, what stays, and that none notices the others."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cloud_verifier.model.batch import Piece
from cloud_verifier.model.kv_cache import Pool, Text
from cloud_verifier.model.target import Target, load_model
from cloud_verifier.model.tree import Tree
from edge_runtime.protocol.errors import TargetError
from edge_runtime.protocol.sampling import Sampling
from tests.models import VOCABULARY_SIZE, save_target

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma"]
TEXT = [17, 30, 205, 9, 77, 150, 3]
GREEDY = Sampling()


class Loaded(NamedTuple):
    """A target and a pool for it, and the same model as transformers alone runs it."""

    target: Target
    model: Any
    pool: Pool

    def logits_alone(self, ids: list[int]) -> torch.Tensor:
        """(V,) behind `ids`, in one plain causal forward."""
        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([ids])).logits[0, -1].float()

    def text(self, ids: list[int]) -> Text:
        """A text of `ids`."""
        text = Text()
        self.read(text, ids)
        return text

    def read(self, text: Text, ids: list[int]) -> None:
        self.target.run(self.pool, [self.target.reading(text, ids)])
        self.pool.keep(text, list(range(len(ids))))

    def score(self, tree: Tree, text: Text) -> torch.Tensor:
        return self.target.runner.logits(self.pool, [self.target.piece(text, tree)])[0]


def side_by_side(path: Path) -> Loaded:
    target = Target(path, device="cpu", dtype=torch.float32)
    return Loaded(target, load_model(path, "cpu", "float32")[0], Pool(target.runner.shape, 0))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return side_by_side(save_target(tmp_path_factory.mktemp("models") / request.param, request.param))


@pytest.fixture(scope="module")
def small(tiny_path: Path) -> Loaded:
    return side_by_side(tiny_path)


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


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
def test_a_tree_in_one_forward_equals_its_paths_alone(
    loaded: Loaded, draft: list[int], siblings: dict[int, list[int]]
) -> None:
    tree = Tree(TEXT[-1], len(TEXT), draft, siblings)
    logits = loaded.score(tree, loaded.text(TEXT[:-1]))
    assert logits.shape == (len(tree), VOCABULARY_SIZE)
    before = TEXT[:-1]
    chain = [TEXT[-1], *draft]
    for row in range(len(chain)):
        assert_same(logits[row], loaded.logits_alone([*before, *chain[: row + 1]]))
    row = len(chain)
    for index, alternatives in sorted(siblings.items()):
        for token in alternatives:
            assert_same(logits[row], loaded.logits_alone([*before, *chain[: index + 1], token]))
            row += 1
    assert row == len(tree)


@pytest.mark.parametrize("rows", [[], [0], [0, 1, 2], [0, 1, 5], [0, 4]], ids=str)
def test_keep_leaves_the_text_of_the_kept_tokens(loaded: Loaded, rows: list[int]) -> None:
    tree = Tree(TEXT[-1], len(TEXT), [11, 12, 13], {0: [40], 1: [42]})
    text = loaded.text(TEXT[:-1])
    loaded.score(tree, text)
    loaded.pool.keep(text, rows)
    ids = TEXT[:-1] + [tree.ids[row] for row in rows]
    assert text.length == len(ids)
    assert_same(loaded.score(Tree(99, len(ids) + 1, [98], {}), text)[1], loaded.logits_alone([*ids, 99, 98]))


@pytest.mark.parametrize("length", [1, 8, 9, 73, 256, 500])
def test_a_text_read_in_pieces_is_the_text(small: Loaded, length: int) -> None:
    ids = [(31 * index + 7) % VOCABULARY_SIZE for index in range(length)]
    text, left, random = Text(), ids, Random(length)
    while left:
        count = random.randint(1, 200)
        small.read(text, left[:count])
        left = left[count:]
    assert text.length == length
    assert_same(small.score(Tree(5, length + 1, [], {}), text)[0], small.logits_alone([*ids, 5]))


def test_texts_longer_than_a_page(tmp_path: Path) -> None:
    loaded = side_by_side(save_target(tmp_path / "long", max_position_embeddings=2048))
    size = loaded.pool.page
    ids = [(31 * index + 7) % VOCABULARY_SIZE for index in range(2 * size + 90)]
    text = loaded.text(ids[: size - 3])
    other = loaded.text(ids[5:20])
    # Over the edge of a page: read, scored and kept.
    tree = Tree(ids[size - 3], size - 2, ids[size - 2 : size + 4], {1: [40], 4: [41]})
    logits = loaded.score(tree, text)
    assert_same(logits[6], loaded.logits_alone(ids[: size + 4]))
    loaded.pool.keep(text, [0, 1, 2, 3, 4, 8])
    said = [*ids[: size + 2], 41]
    assert_same(loaded.score(Tree(7, size + 4, [], {}), text)[0], loaded.logits_alone([*said, 7]))
    loaded.pool.keep(text, [])
    loaded.read(text, ids[len(said) :])
    whole = [*said, *ids[len(said) :]]
    assert_same(loaded.score(Tree(9, len(whole) + 1, [], {}), text)[0], loaded.logits_alone([*whole, 9]))
    assert len(text.pages) == 3
    before = loaded.pool.used
    loaded.pool.release(text)
    assert (loaded.pool.used, text.length) == (before - 3, 0)
    assert_same(loaded.score(Tree(9, 16, [], {}), other)[0], loaded.logits_alone([*ids[5:20], 9]))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_texts_that_share_forwards_do_not_notice_each_other(small: Loaded, seed: int) -> None:
    """Texts come and go, are read in pieces, drafted for at any length, rolled back: each as if it were alone."""
    random = Random(seed)
    pool = Pool(small.target.runner.shape, 0)
    texts: list[tuple[Text, list[int]]] = []
    for _ in range(random.randint(3, 8)):
        if texts and random.random() < 0.3:
            pool.release(texts.pop(random.randrange(len(texts)))[0])
        texts += [(Text(), []) for _ in range(random.randint(0, 2))]
        pieces: list[Piece] = []
        for text, _ in texts:
            ids = [random.randrange(VOCABULARY_SIZE) for _ in range(random.randint(1, 12))]
            if random.random() < 0.3:
                pieces.append(small.target.reading(text, ids))
            else:
                siblings = {
                    i: [random.randrange(VOCABULARY_SIZE)] for i in range(len(ids) - 1) if random.random() < 0.4
                }
                pieces.append(small.target.piece(text, Tree(ids[0], text.length + 1, ids[1:], siblings)))
        if not pieces:
            continue
        logits = iter(small.target.runner.logits(pool, pieces))
        for (text, ids), piece in zip(texts, pieces, strict=True):
            if piece.sampling:
                row = random.randrange(len(piece))
                expected = small.logits_alone([*ids, *piece.ids[: piece.limits[row]], piece.ids[row]])
                assert_same(next(logits)[row], expected)
                kept = [*range(piece.limits[row]), row]
            else:
                kept = list(range(len(piece)))
            pool.keep(text, kept)
            ids += [piece.ids[index] for index in kept]


def test_an_empty_pool_says_so_and_changes_nothing(small: Loaded) -> None:
    pool = Pool(small.target.runner.shape, 0)
    assert pool.used == 0
    text = Text()
    pool.reserve(text, 1)
    assert (pool.used, len(text.pages)) == (1, 1)
    pool.release(text)
    assert pool.used == 0


def adapter(base: Path, path: Path, seed: int, **options: Any) -> Path:
    torch.manual_seed(seed)
    settings = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "up_proj"]}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings | options))
    model.save_pretrained(path)
    return path


def beside(base: Target, path: Path) -> Target:
    target = Target(path, device="cpu", dtype=torch.float32, beside=[base])
    target.settle()
    return target


def test_versions_of_one_base_share_its_weights_and_a_forward(tiny_path: Path, tmp_path: Path) -> None:
    base = Target(tiny_path, device="cpu", dtype=torch.float32)
    paths = [
        adapter(tiny_path, tmp_path / "one", 1),
        adapter(tiny_path, tmp_path / "two", 2, r=7, target_modules=["down_proj", "k_proj"], use_rslora=True),
        adapter(tiny_path, tmp_path / "three", 3, layers_to_transform=[1]),
    ]
    targets = [base, *(beside(base, path) for path in paths)]
    alone = [load_model(path, "cpu", "float32")[0] for path in (tiny_path, *paths)]
    assert {id(target.runner) for target in targets} == {id(base.runner)}
    assert [target.adapter for target in targets] == [0, 1, 2, 3]

    def check(present: list[int]) -> None:
        pool, texts = Pool(base.runner.shape, 0), [Text() for _ in targets]
        tree = Tree(TEXT[-1], len(TEXT), [11, 12], {0: [40]})
        base.run(pool, [targets[i].reading(texts[i], TEXT[:-1]) for i in present])
        for i in present:
            pool.keep(texts[i], list(range(len(TEXT) - 1)))
        logits = base.runner.logits(pool, [targets[i].piece(texts[i], tree) for i in present])
        for i, said in zip(present, logits, strict=True):
            with torch.inference_mode():
                assert_same(said[2], alone[i](input_ids=torch.tensor([[*TEXT, 11, 12]])).logits[0, -1])

    check([0, 1, 2, 3])
    targets[2].retire()
    check([3, 0, 1])
    # The slot is free again.
    targets[2] = beside(base, paths[1])
    assert targets[2].adapter == 2
    check([2, 1, 0, 3])
    for target in targets[1:]:
        target.retire()
    check([0])
    assert not any(module._forward_hooks for module in base.runner.model.modules())


def test_adapters_share_a_base_that_nobody_serves(tiny: Target, tiny_path: Path, tmp_path: Path) -> None:
    paths = [adapter(tiny_path, tmp_path / f"adapter-{seed}", seed) for seed in (1, 2)]
    first = Target(paths[0], device="cpu", dtype=torch.float32, beside=[])
    second = Target(paths[1], device="cpu", dtype=torch.float32, beside=[first])
    base = Target(tiny_path, device="cpu", dtype=torch.float32, name="base", beside=[first, second])
    assert first.runner is second.runner is base.runner
    assert base.version == f"base@{tiny.version.partition('@')[2]}"
    first.settle(), second.settle(), base.settle()
    assert [first.adapter, second.adapter, base.adapter] == [1, 2, 0]


def test_a_version_that_is_no_plain_adapter_shares_the_tensors_that_it_kept(tiny_path: Path, tmp_path: Path) -> None:
    base = Target(tiny_path, device="cpu", dtype=torch.float32)
    path = adapter(tiny_path, tmp_path / "dora", 1, use_dora=True, layers_to_transform=[0], target_modules=["q_proj"])
    tuned = beside(base, path)
    assert tuned.runner is not base.runner
    theirs, ours = dict(tuned.runner.model.named_parameters()), dict(base.runner.model.named_parameters())
    assert [name for name in ours if theirs[name] is not ours[name]] == ["model.layers.0.self_attn.q_proj.weight"]


def test_an_adapter_that_does_not_fit_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    base = Target(tiny_path, device="cpu", dtype=torch.float32)
    path = adapter(tiny_path, tmp_path / "tuned", 1)
    (path / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(TargetError, match=str(path)):
        beside(base, path)
    assert len(base.runner.adapters) == 0


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_attention_with_more_to_it_is_refused(tmp_path: Path, model_type: str) -> None:
    changes: dict[str, Any] = {"layer_types": ["full_attention", "full_attention"]}
    with pytest.raises(TargetError, match="does not run with our attention"):
        Target(save_target(tmp_path / "model", model_type, **changes), device="cpu", dtype=torch.float32)


def test_greedy_is_what_self_tests_ask_for(small: Loaded) -> None:
    piece = small.target.piece(Text(), Tree(1, 1, [], {}))
    assert piece.sampling == GREEDY
