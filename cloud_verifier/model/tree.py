"""The token tree of one round: the last known token, the draft after it, and siblings of draft tokens.

Node 0 is the last token that board and verifier both know; nodes 1 .. K are the draft, a chain; the siblings follow. A
sibling of draft token i has that token's position and attends to what that token attends to. One forward scores all
nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from cloud_verifier.model.sampling import SampledToken
from edge_runtime.protocol.messages import TokenLogprobs

# By dtype: two scores closer than this could change places under other arithmetic (another kernel or batch shape).
CLOSE_CALL_MARGIN = {"float32": 1e-4, "bfloat16": 0.25, "float16": 0.03}


class Verification(NamedTuple):
    """The result of verifying one tree.

    Attributes:
        accepted: accepted length: how many leading draft tokens equal the target's.
        tokens: the target's own tokens after them: one, two if a sibling matched, none after an end-of-text token.
        rows: nodes whose keys and values belong to the sequence: the whole path except its last token.
        ended: the path ends with an end-of-text token.
        margins: (position, margin) of every token sampled on the path.
        logprobs: log-probabilities of these tokens, which are the accepted ones and `tokens`, if they were asked for.
    """

    accepted: int
    tokens: list[int]
    rows: list[int]
    ended: bool
    margins: list[tuple[int, float]]
    logprobs: Sequence[TokenLogprobs] = ()


class TokenTree:
    """Nodes of one round, flattened for one forward.

    Args:
        last: the token at `position - 1`.
        position: absolute position of the first draft token.
        draft: K token ids.
        siblings: alternative token ids by draft index.

    Attributes:
        ids, positions: token id and absolute position of each node.
        visible_prefix: how many nodes, from the first, each node attends to in addition to itself.
    """

    def __init__(self, last: int, position: int, draft: list[int], siblings: Mapping[int, list[int]]) -> None:
        self.position = position
        self.draft = draft
        self.ids = [last, *draft]
        self.positions = list(range(position - 1, position + len(draft)))
        self.visible_prefix = list(range(len(draft) + 1))
        self._sibling_rows: dict[tuple[int, int], int] = {}
        for index, alternatives in sorted(siblings.items()):
            for token in dict.fromkeys(alternatives):
                self._sibling_rows[index, token] = len(self.ids)
                self.ids.append(token)
                self.positions.append(position + index)
                self.visible_prefix.append(index + 1)

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, row: int) -> list[int]:
        """The tokens from the one after node 0 up to the node of `row`."""
        return [*self.ids[1 : max(1, self.visible_prefix[row])], *self.ids[row : row + 1]] if row else []

    def verify(self, sampled_after: Callable[[int], SampledToken], end_ids: frozenset[int]) -> Verification:
        """Follow the target's tokens from node 0 as far as the tree has matching nodes.

        Args:
            sampled_after: returns the token that the target samples after a node, given its row.
            end_ids: tokens that end the text; empty to continue past them.
        """
        if not self.draft:
            # A stream's forwards have no draft, and a busy GPU has hundreds of them at a time: the short way.
            token, margin, own_logprobs = sampled_after(0)
            margins = [(self.positions[0] + 1, margin)]
            logprobs = [own_logprobs] if own_logprobs else []
            return Verification(0, [token], [0], token in end_ids, margins, logprobs=logprobs)
        row, rows = 0, [0]
        margins = []
        logprobs = []

        def sample() -> int:
            sampled = sampled_after(row)
            margins.append((self.positions[row] + 1, sampled.margin))
            if sampled.logprobs:
                logprobs.append(sampled.logprobs)
            return sampled.token

        def verified(accepted: int, tokens: list[int], ended: bool) -> Verification:
            return Verification(accepted, tokens, rows, ended, margins, logprobs=tuple(logprobs))

        for index, draft_token in enumerate(self.draft):
            token = sample()
            if token != draft_token:
                sibling = self._sibling_rows.get((index, token))
                if sibling is None or token in end_ids:
                    return verified(index, [token], token in end_ids)
                row = sibling
                rows.append(row)
                bonus = sample()
                return verified(index, [token, bonus], bonus in end_ids)
            if token in end_ids:
                return verified(index + 1, [], True)
            row = index + 1
            rows.append(row)
        token = sample()
        return verified(len(self.draft), [token], token in end_ids)
