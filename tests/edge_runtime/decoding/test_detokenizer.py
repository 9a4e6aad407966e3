"""Streamed text equals `tokenizer.decode` of the whole, for the kinds of tokenizers that models have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from edge_runtime.decoding import Detokenizer, decode_continuation
from edge_runtime.decoding.detokenizer import _RunDecoder

TEXTS = ["the board drafts größer tokens", "the cloud verifies 語 🙂 tokens", "a literal \ufffd and a space"]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def make_byte_level() -> Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return add_special_tokens(tokenizer)


def make_byte_fallback() -> Tokenizer:
    """BPE with byte fallback that drops the first space, as Llama 2, Mistral and Phi-3 have it."""
    pieces = [*BYTE_TOKENS, "\ufffd", *sorted(set("▁" + "".join(TEXTS).replace(" ", "▁")) - set("語🙂\ufffd"))]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    vocabulary |= {left + right: len(vocabulary) + index for index, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return add_special_tokens(tokenizer)


def make_metaspace() -> Tokenizer:
    """Unigram pieces of SentencePiece, as T5 and XGLM have them."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>"))
    return add_special_tokens(tokenizer)


def make_nested_byte_level() -> Tokenizer:
    """Byte-level BPE whose decoder does more than map bytes."""
    tokenizer = make_byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip("_", 0, 0)])
    return tokenizer


def add_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    tokenizer.add_tokens([AddedToken("<tool_call>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $0", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


TOKENIZERS = {
    make.__name__.removeprefix("make_"): make() for make in (make_byte_level, make_byte_fallback, make_metaspace)
}
NESTED = make_nested_byte_level()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_can_be_visible(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    tokenizer.add_special_tokens([AddedToken("[CALL]"), AddedToken("<｜call▁end｜>")])
    ids = [tokenizer.token_to_id(token) for token in ("<s>", "[CALL]", "<｜call▁end｜>", "</s>")]
    words = tokenizer.encode("the board drafts", add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer, words, visible={ids[1], ids[2]})
    text = "".join(map(detokenizer.step, [*ids[:2], *words, *ids[2:]])) + detokenizer.flush()
    assert text.replace(" ", "") == "[CALL]theboarddrafts<｜call▁end｜>"


def draw_ids(data: st.DataObject, tokenizer: Tokenizer, size: int = 24) -> list[int]:
    ids: list[int] = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=size))
    return ids


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_pieces_of_any_ids_are_the_decoded_whole(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = draw_ids(data, tokenizer)
    assert decode_continuation(tokenizer, [], ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", [*TOKENIZERS, "nested"])
@pytest.mark.parametrize("text", [*TEXTS, *(f"{text} {text}\n" for text in TEXTS)])
def test_a_text_cut_anywhere_continues_as_in_the_whole(name: str, text: str) -> None:
    tokenizer = TOKENIZERS.get(name, NESTED)
    ids = tokenizer.encode(text).ids
    whole = tokenizer.decode(ids)
    for cut in range(1, len(ids)):
        before = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
        if "\ufffd" not in text and not whole.startswith(before):
            pytest.fail("the test cannot tell where the prompt ends")
        shown = tokenizer.decode(ids[:cut])
        if whole.startswith(shown):
            assert decode_continuation(tokenizer, ids[:cut], ids[cut:]) == whole[len(shown) :]
        else:  # within a character, which is shown whole
            assert decode_continuation(tokenizer, ids[:cut], ids[cut:]) == whole[len(before) :]


@pytest.mark.parametrize("name", ["byte_fallback", "metaspace"])
def test_the_first_word_of_a_continuation_keeps_its_space(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    prompt, ids = tokenizer.encode("the board").ids, tokenizer.encode("drafts", add_special_tokens=False).ids
    assert tokenizer.decode(ids) == "drafts"
    assert decode_continuation(tokenizer, prompt, ids) == " drafts"
    # A special token has no text, so it is no context.
    assert decode_continuation(tokenizer, [*prompt, tokenizer.token_to_id("</s>")], ids) == " drafts"


@pytest.mark.parametrize("name", [*TOKENIZERS, "nested"])
def test_a_literal_replacement_character_at_the_end_is_text(name: str) -> None:
    tokenizer = TOKENIZERS.get(name, NESTED)
    ids = tokenizer.encode("a literal \ufffd", add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.step, ids)) + detokenizer.flush() == tokenizer.decode(ids)
    assert tokenizer.decode(ids).endswith("\ufffd") or name == "metaspace"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_characters_come_whole(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("the größer 🙂 tokens").ids
    if name == "metaspace":
        ids = [token for token in ids if tokenizer.id_to_token(token) != "<unk>"]
    detokenizer = Detokenizer(tokenizer)
    assert not any("\ufffd" in detokenizer.step(token) for token in ids)


@pytest.mark.parametrize(("name", "token"), [("byte_level", "Ã"), ("byte_fallback", "<0xC3>")])
def test_thousands_of_invalid_bytes_are_each_decoded_once(
    name: str, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = TOKENIZERS[name]
    decoded = count_decoded(tokenizer, monkeypatch)
    count = 5000
    text = decode_continuation(tokenizer, tokenizer.encode("the").ids, [tokenizer.token_to_id(token)] * count)
    assert text == "\ufffd" * count
    assert decoded() <= 2 * count


def count_decoded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that says how many ids `tokenizer` has been asked to decode."""
    total = 0

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(tokenizer, name)

        def decode(self, ids: list[int], **options: bool) -> str:
            nonlocal total
            total += len(ids)
            text: str = tokenizer.decode(ids, **options)
            return text

    make = _RunDecoder.__init__
    monkeypatch.setattr(_RunDecoder, "__init__", lambda self, _: make(self, Counting()))
    return lambda: total


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_a_preview_changes_nothing(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids, tail = draw_ids(data, tokenizer), draw_ids(data, tokenizer)
    detokenizer, other = Detokenizer(tokenizer), Detokenizer(tokenizer)
    shown = ""
    for token in ids:
        detokenizer.preview(tail)
        shown += detokenizer.step(token)
        other.step(token)
    assert detokenizer.preview(tail) == [other.step(token) for token in tail]
    assert shown + detokenizer.flush() == tokenizer.decode(ids)
