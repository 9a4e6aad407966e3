"""The token tree of a round: who sees whom, and the walk along the target's choices."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_verifier.model.sampling import Choice
from cloud_verifier.model.tree import Tree, Verdict

END = frozenset({0})
tokens = st.integers(0, 3)
drafts = st.lists(tokens, max_size=6)
sibling_maps = st.dictionaries(st.integers(0, 5), st.lists(tokens, max_size=4), max_size=3)


def next_token(text: tuple[int, ...], mood: int) -> int:
    """What a target of four tokens says behind `text`: any function will do."""
    return hash((text, mood)) % 4


def paths(tree: Tree) -> list[tuple[int, ...]]:
    """Each node's text, read off the limits alone: the tokens that it sees, itself last."""
    return [(*tree.ids[:limit], tree.ids[node]) for node, limit in enumerate(tree.limits)]


def walk(tree: Tree, mood: int, end_ids: frozenset[int]) -> Verdict:
    texts = paths(tree)
    return tree.walk(lambda row: Choice(next_token(texts[row], mood), 1.0), end_ids)


def test_nodes_of_a_draft_with_siblings() -> None:
    tree = Tree(9, 100, [1, 2], {1: [5, 6], 0: [7]})
    assert tree.ids == [9, 1, 2, 7, 5, 6]
    assert tree.positions == [99, 100, 101, 100, 101, 101]
    assert paths(tree) == [(9,), (9, 1), (9, 1, 2), (9, 7), (9, 1, 5), (9, 1, 6)]


def test_repeated_siblings_take_one_node() -> None:
    assert Tree(9, 1, [1], {0: [3, 3, 4, 3]}).ids == [9, 1, 3, 4]


def test_all_accepted_brings_a_bonus() -> None:
    verdict = Tree(9, 5, [1, 2], {}).walk([Choice(1, 0.5), Choice(2, 0.4), Choice(3, 0.3)].__getitem__, END)
    assert verdict == Verdict(2, [3], [0, 1, 2], False, [(5, 0.5), (6, 0.4), (7, 0.3)])


def test_the_first_difference_is_replaced() -> None:
    verdict = Tree(9, 5, [1, 2], {}).walk([Choice(1, 0.5), Choice(7, 0.4), Choice(3, 0.3)].__getitem__, END)
    assert verdict == Verdict(1, [7], [0, 1], False, [(5, 0.5), (6, 0.4)])


def test_a_sibling_that_is_the_targets_token_brings_one_more() -> None:
    choices = [Choice(1, 0.5), Choice(7, 0.4), Choice(3, 0.3), Choice(8, 0.2)]
    verdict = Tree(9, 5, [1, 2], {1: [7]}).walk(choices.__getitem__, END)
    assert verdict == Verdict(1, [7, 8], [0, 1, 3], False, [(5, 0.5), (6, 0.4), (7, 0.2)])


def test_nothing_follows_an_end_token() -> None:
    accepted = Tree(9, 5, [0, 2], {}).walk([Choice(0, 1.0), Choice(2, 1.0), Choice(3, 1.0)].__getitem__, END)
    assert accepted == Verdict(1, [], [0], True, [(5, 1.0)])
    sibling = Tree(9, 5, [1], {0: [0]}).walk([Choice(0, 1.0)].__getitem__, END)
    assert sibling == Verdict(0, [0], [0], True, [(5, 1.0)])
    bonus = Tree(9, 5, [1], {}).walk([Choice(1, 1.0), Choice(0, 1.0)].__getitem__, END)
    assert bonus == Verdict(1, [0], [0, 1], True, [(5, 1.0), (6, 1.0)])


@pytest.mark.parametrize("end_ids", [frozenset(), END], ids=["on past the end", "end"])
@given(drafts, sibling_maps, st.integers(0, 1000))
def test_the_walk_says_what_the_target_would_say_alone(
    end_ids: frozenset[int], draft: list[int], siblings: dict[int, list[int]], mood: int
) -> None:
    siblings = {index: ids for index, ids in siblings.items() if index < len(draft)}
    tree = Tree(2, 50, draft, siblings)
    verdict = walk(tree, mood, end_ids)
    said = [*draft[: verdict.accepted], *verdict.tokens]

    text: tuple[int, ...] = (2,)
    alone: list[int] = []
    while len(alone) < len(said) and not (alone and alone[-1] in end_ids):
        alone.append(next_token(text, mood))
        text = (*text, alone[-1])
    assert said == alone
    assert verdict.ended == (said[-1] in end_ids)
    assert verdict.margins == [(50 + index, 1.0) for index in range(len(said))]
    # Kept are the nodes of the path but its last token.
    assert [tree.ids[row] for row in verdict.rows] == [2, *said[:-1]]


@given(drafts, sibling_maps, st.integers(0, 1000))
def test_siblings_never_cost_a_token(draft: list[int], siblings: dict[int, list[int]], mood: int) -> None:
    siblings = {index: ids for index, ids in siblings.items() if index < len(draft)}
    with_siblings = walk(Tree(2, 50, draft, siblings), mood, frozenset())
    without = walk(Tree(2, 50, draft, {}), mood, frozenset())
    assert with_siblings.accepted == without.accepted
    assert with_siblings.tokens[:1] == without.tokens
    truth = without.tokens[0]
    hit = without.accepted < len(draft) and truth in siblings.get(without.accepted, [])
    assert len(with_siblings.tokens) == 1 + hit
