"""The tokenizer of the toy family."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from edge_runtime.protocol.errors import InputError
from export.data.corpus import Domain, Source, gather_corpus
from tests.toy_family.tokenizer import save_tokenizer, train_tokenizer

SMALL = Domain("python", (".py",), (Source("httpx", "BSD-3-Clause", "BSD", ("httpx",)),))


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    texts = [document.text for document in gather_corpus(SMALL).documents]
    trained = train_tokenizer(texts, 400)
    save_tokenizer(trained, tmp_path, context=128)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 400
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (0, 1, 128)
    text = "def héllo(x):\n\treturn '✓', 1234\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == trained.encode(text).ids
    assert tokenizer.decode(ids) == text
    with pytest.raises(InputError, match="fill only"):
        train_tokenizer([text], 8192)
