"""A head with fewer rows: only the ids that a text has.

A head of 128k rows is a third of what a small draft reads per token. A trimmed one cannot guess what is missing, which
costs acceptance and no correctness; the noise of the ids that are left stays theirs.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from edge_runtime.protocol.errors import InputError

Ids = npt.NDArray[np.int32]


def ids_of_text(
    tokenizer: Tokenizer, text: str, vocabulary_size: int, most: int | None = None
) -> npt.NDArray[np.int32]:
    """The ids that `text` has, and the special ones; ascending.

    Args:
        most: leave out the rarest, so that no more than this remain.

    Raises:
        InputError: the text has too few different tokens to guess from, or the vocabulary has no more.
    """
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    # Line by line: the tokenizer would hold all of a long text's pieces at once.
    counts = Counter(
        index
        for encoding in tokenizer.encode_batch_fast(text.splitlines(keepends=True), add_special_tokens=False)
        for index in encoding.ids
    )
    # Of equally frequent ids the lower: the same text gives the same head.
    ranked = sorted(counts.keys() - special, key=lambda index: (-counts[index], index))
    kept = sorted({*ranked[: None if most is None else max(0, most - len(special))], *special})
    kept = [index for index in kept if index < vocabulary_size]
    if len(kept) < 2 or not ranked:
        raise InputError("the text to trim the head by has fewer than two different tokens; give a longer one")
    return np.array(kept, np.int32)
