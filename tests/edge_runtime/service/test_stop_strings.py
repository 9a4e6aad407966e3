"""Stop strings and characters that span tokens, however the text is split into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from edge_runtime.decoding.detokenizer import Detokenizer
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.service.stop_strings import StopStringFilter

TEXTS = st.text("ab\n", max_size=24)
STOP_STRINGS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


def filter_pieces(pieces: list[str], stop_strings: list[str]) -> tuple[str, bool]:
    """Return the text that passes the filter, and whether a stop string was found."""
    stop_filter = StopStringFilter(stop_strings)
    shown = "".join(stop_filter.feed(piece) for piece in pieces)
    return shown + stop_filter.flush(), stop_filter.found


@given(TEXTS, STOP_STRINGS, st.data())
def test_the_result_does_not_depend_on_how_the_text_is_split(
    text: str, stop_strings: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    # Reference: read until a stop string is complete, and remove it.
    suffixes = tuple(stop_strings)
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(suffixes)] if stop_strings else []
    if ends:
        whole = text[: ends[0]]
        longest = max((stop for stop in stop_strings if whole.endswith(stop)), key=len)
        assert filter_pieces(pieces, stop_strings) == (whole.removesuffix(longest), True)
    else:
        assert filter_pieces(pieces, stop_strings) == (text, False)


@given(TEXTS, STOP_STRINGS)
def test_only_a_possible_start_of_a_stop_string_is_held_back(text: str, stop_strings: list[str]) -> None:
    stop_filter = StopStringFilter(stop_strings)
    shown = ""
    for index, character in enumerate(text):
        shown += stop_filter.feed(character)
        if stop_filter.found:
            return
        held = text[len(shown) : index + 1]
        assert not held or any(stop.startswith(held) for stop in stop_strings)


def test_special_tokens_and_partial_characters_are_not_shown(draft: OnnxDraft) -> None:
    ids = draft.tokenizer.encode("größer: 語 🙂").ids
    detokenizer = Detokenizer(draft.tokenizer)
    pieces = [detokenizer.step(token) for token in [0, *ids[:-1], 0, ids[-1]]]
    assert "".join(pieces) == "größer: 語 🙂"
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 258), max_size=40))
def test_invalid_byte_sequences_do_not_end_the_text(ids: list[int]) -> None:
    """A vocabulary with byte fallback, as Llama has it: at high temperature, bytes come in any order."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁hello": 256, "world": 257, "é": 258}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.step(token) for token in ids)
    assert text.count("world") == ids.count(257)
    assert not any(0xD800 <= ord(character) < 0xE000 for character in text)


@pytest.mark.parametrize("stop_strings", [["\n"], ["x", "\n\n", "abc"]])
def test_without_a_match_the_whole_text_passes(stop_strings: list[str]) -> None:
    assert filter_pieces(["ab", "ba", "\tab"], stop_strings) == ("abba\tab", False)
