"""The token tree of one round: the last known token, the draft behind it, and siblings beside the draft.

Node 0 is the last id that both ends know; nodes 1 .. K are the draft, a chain; the siblings follow. A sibling of draft
token i stands at that token's position and sees what it would have seen. One forward scores them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cloud_verifier.model.sampling import Choice

# Two scores closer than this could change places under other arithmetic (another kernel, another batch shape).
CLOSE_CALL = {"float32": 1e-4, "bfloat16": 0.25, "float16": 0.03}


class Verdict(NamedTuple):
    """What one forward decided.

    Attributes:
        accepted: how many leading draft tokens equal the target's choices.
        tokens: the target's own tokens behind them: one, or two where a sibling matched; none after an end token.
        rows: nodes whose keys and values belong to the text: all of the path but its last token.
        ended: the path ends with an end-of-text token.
        margins: (position, margin) of every choice on the path.
    """

    accepted: int
    tokens: list[int]
    rows: list[int]
    ended: bool
    margins: list[tuple[int, float]]


class Tree:
    """Nodes of one round, flattened for one forward.

    Args:
        last: the id at `position - 1`.
        position: absolute position of the first draft token.
        draft: K ids.
        siblings: alternatives by draft index.
    """

    def __init__(self, last: int, position: int, draft: list[int], siblings: dict[int, list[int]]) -> None:
        self.position = position
        self.draft = draft
        self.ids = [last, *draft]
        self.positions = list(range(position - 1, position + len(draft)))
        # How many nodes, from the first, each node sees beside itself.
        self.limits = list(range(len(draft) + 1))
        self._sibling_rows: dict[tuple[int, int], int] = {}
        for index, alternatives in sorted(siblings.items()):
            for token in dict.fromkeys(alternatives):
                self._sibling_rows[index, token] = len(self.ids)
                self.ids.append(token)
                self.positions.append(position + index)
                self.limits.append(index + 1)

    def __len__(self) -> int:
        return len(self.ids)

    def walk(self, choice: Callable[[int], Choice], end_ids: frozenset[int]) -> Verdict:
        """Follows the target's choices from node 0 as far as the tree goes.

        Args:
            choice: the target's choice behind a node, by row.
            end_ids: tokens that end the text; empty to go on past them.
        """
        row, rows = 0, [0]
        margins: list[tuple[int, float]] = []

        def chosen() -> int:
            token, margin = choice(row)
            margins.append((self.positions[row] + 1, margin))
            return token

        for index, guess in enumerate(self.draft):
            token = chosen()
            if token != guess:
                sibling = self._sibling_rows.get((index, token))
                if sibling is None or token in end_ids:
                    return Verdict(index, [token], rows, token in end_ids, margins)
                row = sibling
                rows.append(row)
                bonus = chosen()
                return Verdict(index, [token, bonus], rows, bonus in end_ids, margins)
            if token in end_ids:
                return Verdict(index + 1, [], rows, True, margins)
            row = index + 1
            rows.append(row)
        token = chosen()
        return Verdict(len(self.draft), [token], rows, token in end_ids, margins)
