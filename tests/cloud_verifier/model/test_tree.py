"""The token tree of a round: which nodes attend to which, and verification along the target's tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_verifier.model.sampling import SampledToken
from cloud_verifier.model.tree import TokenTree, Verification

END = frozenset({0})
tokens = st.integers(0, 3)
drafts = st.lists(tokens, max_size=6)
sibling_maps = st.dictionaries(st.integers(0, 5), st.lists(tokens, max_size=4), max_size=3)


def next_token(text: tuple[int, ...], seed: int) -> int:
    """The token that an arbitrary deterministic target of four tokens generates after `text`."""
    return hash((text, seed)) % 4


def visible_texts(tree: TokenTree) -> list[tuple[int, ...]]:
    """By node: the tokens that it attends to, itself last."""
    return [(*tree.ids[:prefix], tree.ids[node]) for node, prefix in enumerate(tree.visible_prefix)]


def verify(tree: TokenTree, seed: int, end_ids: frozenset[int]) -> Verification:
    texts = visible_texts(tree)
    return tree.verify(lambda row: SampledToken(next_token(texts[row], seed), 1.0), end_ids)


def test_nodes_of_a_draft_with_siblings() -> None:
    tree = TokenTree(9, 100, [1, 2], {1: [5, 6], 0: [7]})
    assert tree.ids == [9, 1, 2, 7, 5, 6]
    assert tree.positions == [99, 100, 101, 100, 101, 101]
    assert visible_texts(tree) == [(9,), (9, 1), (9, 1, 2), (9, 7), (9, 1, 5), (9, 1, 6)]


def test_repeated_siblings_take_one_node() -> None:
    assert TokenTree(9, 1, [1], {0: [3, 3, 4, 3]}).ids == [9, 1, 3, 4]


def test_accepting_the_whole_draft_yields_a_bonus_token() -> None:
    sampled = [SampledToken(1, 0.5), SampledToken(2, 0.4), SampledToken(3, 0.3)]
    verification = TokenTree(9, 5, [1, 2], {}).verify(sampled.__getitem__, END)
    assert verification == Verification(2, [3], [0, 1, 2], False, [(5, 0.5), (6, 0.4), (7, 0.3)])


def test_the_first_rejected_token_is_replaced_by_the_targets() -> None:
    sampled = [SampledToken(1, 0.5), SampledToken(7, 0.4), SampledToken(3, 0.3)]
    verification = TokenTree(9, 5, [1, 2], {}).verify(sampled.__getitem__, END)
    assert verification == Verification(1, [7], [0, 1], False, [(5, 0.5), (6, 0.4)])


def test_a_sibling_that_matches_yields_one_more_token() -> None:
    sampled = [SampledToken(1, 0.5), SampledToken(7, 0.4), SampledToken(3, 0.3), SampledToken(8, 0.2)]
    verification = TokenTree(9, 5, [1, 2], {1: [7]}).verify(sampled.__getitem__, END)
    assert verification == Verification(1, [7, 8], [0, 1, 3], False, [(5, 0.5), (6, 0.4), (7, 0.2)])


def test_no_token_follows_an_end_token() -> None:
    sampled = [SampledToken(0, 1.0), SampledToken(2, 1.0), SampledToken(3, 1.0)]
    accepted = TokenTree(9, 5, [0, 2], {}).verify(sampled.__getitem__, END)
    assert accepted == Verification(1, [], [0], True, [(5, 1.0)])
    sibling = TokenTree(9, 5, [1], {0: [0]}).verify([SampledToken(0, 1.0)].__getitem__, END)
    assert sibling == Verification(0, [0], [0], True, [(5, 1.0)])
    bonus = TokenTree(9, 5, [1], {}).verify([SampledToken(1, 1.0), SampledToken(0, 1.0)].__getitem__, END)
    assert bonus == Verification(1, [0], [0, 1], True, [(5, 1.0), (6, 1.0)])


@pytest.mark.parametrize("end_ids", [frozenset(), END], ids=["ignore end tokens", "stop at end tokens"])
@given(drafts, sibling_maps, st.integers(0, 1000))
def test_verified_tokens_are_what_the_target_generates_token_by_token(
    end_ids: frozenset[int], draft: list[int], siblings: dict[int, list[int]], seed: int
) -> None:
    siblings = {index: ids for index, ids in siblings.items() if index < len(draft)}
    tree = TokenTree(2, 50, draft, siblings)
    verification = verify(tree, seed, end_ids)
    generated = [*draft[: verification.accepted], *verification.tokens]

    text: tuple[int, ...] = (2,)
    reference: list[int] = []
    while len(reference) < len(generated) and not (reference and reference[-1] in end_ids):
        reference.append(next_token(text, seed))
        text = (*text, reference[-1])
    assert generated == reference
    assert verification.ended == (generated[-1] in end_ids)
    assert verification.margins == [(50 + index, 1.0) for index in range(len(generated))]
    # The kept rows are the nodes of the path except its last token.
    assert [tree.ids[row] for row in verification.rows] == [2, *generated[:-1]]


@given(drafts, sibling_maps, st.integers(0, 1000))
def test_siblings_never_cost_a_token(draft: list[int], siblings: dict[int, list[int]], seed: int) -> None:
    siblings = {index: ids for index, ids in siblings.items() if index < len(draft)}
    with_siblings = verify(TokenTree(2, 50, draft, siblings), seed, frozenset())
    without = verify(TokenTree(2, 50, draft, {}), seed, frozenset())
    assert with_siblings.accepted == without.accepted
    assert with_siblings.tokens[:1] == without.tokens
    correction = without.tokens[0]
    matched = without.accepted < len(draft) and correction in siblings.get(without.accepted, [])
    assert len(with_siblings.tokens) == 1 + matched
