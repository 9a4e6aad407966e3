"""Stop strings and characters, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from edge_runtime.decoding.detokenizer import Detokenizer
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.service.stop_strings import StopStringFilter

TEXT = st.text("ab\n", max_size=24)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


def passed(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    finder = StopStringFilter(stops)
    shown = "".join(finder.feed(piece) for piece in pieces)
    return shown + finder.flush(), finder.found


@given(TEXT, STOPS, st.data())
def test_the_text_does_not_depend_on_how_it_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    # By definition: read until a stop string is complete, and leave that out.
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))] if stops else []
    if ends:
        whole = text[: ends[0]]
        longest = max((stop for stop in stops if whole.endswith(stop)), key=len)
        assert passed(pieces, stops) == (whole.removesuffix(longest), True)
    else:
        assert passed(pieces, stops) == (text, False)


@given(TEXT, STOPS)
def test_nothing_is_shown_that_may_be_taken_back_and_nothing_else_held(text: str, stops: list[str]) -> None:
    finder = StopStringFilter(stops)
    shown = ""
    for index, character in enumerate(text):
        shown += finder.feed(character)
        if finder.found:
            return
        held = text[len(shown) : index + 1]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_special_tokens_and_half_characters_are_not_shown(draft: OnnxDraft) -> None:
    ids = draft.tokenizer.encode("größer: 語 🙂").ids
    detokeniser = Detokenizer(draft.tokenizer)
    pieces = [detokeniser.step(token) for token in [0, *ids[:-1], 0, ids[-1]]]
    assert "".join(pieces) == "größer: 語 🙂"
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 258), max_size=40))
def test_bytes_that_are_no_text_end_nothing(ids: list[int]) -> None:
    """A vocabulary of bytes, as Llama's has them: at a high temperature they come in any order."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁hello": 256, "world": 257, "é": 258}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    detokeniser = Detokenizer(tokenizer)
    text = "".join(detokeniser.step(token) for token in ids)
    assert text.count("world") == ids.count(257)
    assert not any(0xD800 <= ord(character) < 0xE000 for character in text)


@pytest.mark.parametrize("stops", [["\n"], ["x", "\n\n", "abc"]])
def test_without_a_match_all_comes(stops: list[str]) -> None:
    assert passed(["ab", "ba", "\tab"], stops) == ("abba\tab", False)
