"""Trims the head of a draft to the ids of a text.

A head of 128k rows is a third of the bytes that a small draft reads per token. A trimmed head cannot propose the
missing ids, which costs acceptance but not correctness; the remaining ids keep their noise.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from edge_runtime.protocol.errors import InputError


def select_head_ids(
    tokenizer: Tokenizer, text: str, vocabulary_size: int, max_ids: int | None = None
) -> npt.NDArray[np.int32]:
    """Return the ids that occur in `text` and the special ids, ascending.

    Args:
        max_ids: keep at most this many ids by leaving out the rarest; special ids are always kept.

    Raises:
        InputError: fewer than two ids remain.
    """
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    # Line by line: for a single long text the tokenizer would hold all encodings at once.
    counts = Counter(
        index
        for encoding in tokenizer.encode_batch_fast(text.splitlines(keepends=True), add_special_tokens=False)
        for index in encoding.ids
    )
    # Equally frequent ids are ordered by id, so that the same text gives the same head.
    ranked = sorted(counts.keys() - special, key=lambda index: (-counts[index], index))
    selected = sorted({*ranked[: None if max_ids is None else max(0, max_ids - len(special))], *special})
    selected = [index for index in selected if index < vocabulary_size]
    if len(selected) < 2 or not ranked:
        raise InputError("the text to trim the head by has fewer than two different tokens; give a longer one")
    return np.array(selected, np.int32)
