"""The lower bound of a text's tokens is one, for real tokenizers and any text; prompts are tokenized off the loop."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from edge_runtime.service.prompt_tokenizer import PromptTokenizer, PromptTooLong, count_at_least, encode_prompt
from tests.toy_family import FAMILY

TOY = Tokenizer.from_file(str(FAMILY / "bundle" / "tokenizer.json"))


def changed(**parts: object) -> Tokenizer:
    """The toy tokenizer with another normalizer, pre-tokenizer and so on."""
    tokenizer = Tokenizer.from_str(TOY.to_str())
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def with_byte_fallback() -> Tokenizer:
    """A small tokenizer of Llama 2's kind."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for token in ("▁", "a", "b", "▁a", "ab", "abab", "▁▁", "▁▁▁▁", "é"):
        vocabulary[token] = len(vocabulary)
    merges = [("▁", "a"), ("a", "b"), ("ab", "ab"), ("▁", "▁"), ("▁▁", "▁▁")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<0x00>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


BOUNDED = {
    "toy": TOY,
    "nfc": changed(normalizer=normalizers.NFC()),
    "nfkd": changed(normalizer=normalizers.Sequence([normalizers.NFKD()])),
    "fallback": with_byte_fallback(),
}
# Runs that have long tokens, characters that normalization joins (four at a time) or replaces, and anything else.
PIECES = st.sampled_from(["    ", "\n", "return", "self.", "ab", "é", "語", "👍", "▁", "e\u0301", "\u1fbe\u0308\u0301"])
TEXTS = st.lists(PIECES | st.text(max_size=4), max_size=60).map("".join)


@pytest.mark.parametrize("name", BOUNDED)
@given(text=TEXTS)
def test_no_text_has_fewer_tokens(name: str, text: str) -> None:
    assert count_at_least(BOUNDED[name], text) <= len(BOUNDED[name].encode(text, add_special_tokens=False))


@pytest.mark.parametrize(("name", "character"), [("nfc", "\u03b1\u0313\u0300\u0345"), ("nfkd", "\u212b")])
def test_the_bound_holds_where_normalization_shrinks_most(name: str, character: str) -> None:
    text = character * 500
    assert 0 < count_at_least(BOUNDED[name], text) <= len(BOUNDED[name].encode(text))


def test_the_bound_is_tight_enough_to_be_of_use() -> None:
    # The longest tokens are runs of spaces, of which words have none.
    text = "the board drafts and the verifier accepts\n" * 100
    assert count_at_least(TOY, text) > len(TOY.encode(text)) / 8
    assert count_at_least(TOY, "7" * 1000) == 1000 - 1
    assert count_at_least(BOUNDED["nfc"], text) == count_at_least(TOY, text)


@pytest.mark.parametrize(
    "tokenizer",
    [
        changed(normalizer=normalizers.Strip()),
        changed(normalizer=normalizers.Replace(Regex("a+"), "a")),
        changed(normalizer=normalizers.Replace("aaaa", "a")),
        changed(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
        changed(pre_tokenizer=pre_tokenizers.Split(" ", "removed")),
        Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")),
        Tokenizer(models.BPE({"a": 0, "[UNK]": 1}, [], unk_token="[UNK]", fuse_unk=True)),
    ],
)
def test_tokenizers_that_may_drop_text_have_no_bound(tokenizer: Tokenizer) -> None:
    assert count_at_least(tokenizer, "aaaa bbbb " * 1000) == 0


def test_truncation_and_tokens_that_strip_spaces_have_no_bound() -> None:
    truncating, stripping = changed(), changed()
    truncating.enable_truncation(10)
    stripping.add_special_tokens([AddedToken("<|end|>", rstrip=True)])
    for tokenizer in (truncating, stripping):
        assert count_at_least(tokenizer, "<|end|>" + " " * 10_000) == 0


def test_a_text_that_cannot_fit_is_not_tokenized() -> None:
    with pytest.raises(PromptTooLong) as caught:
        encode_prompt(TOY, "7" * 5000, special=True, limit=2048)
    assert caught.value.tokens == 5000 - 1
    ids, added = encode_prompt(TOY, "7" * 2000, special=True, limit=2048)
    assert ids == TOY.encode("7" * 2000).ids and added == [0] * 2000


async def test_work_runs_one_at_a_time_and_not_for_clients_that_have_left() -> None:
    tokenizer, running, finish = PromptTokenizer(), threading.Event(), threading.Event()
    done: list[str] = []

    def first() -> str:
        running.set()
        assert finish.wait(300)
        done.append("first")
        return "result"

    connected, left = (asyncio.get_running_loop().create_future() for _ in range(2))
    one = asyncio.create_task(tokenizer.run(first, connected))
    two = asyncio.create_task(tokenizer.run(lambda: done.append("two"), left))
    three = asyncio.create_task(tokenizer.run(lambda: done.append("three"), connected))
    await asyncio.to_thread(running.wait)
    left.set_result(None)
    with pytest.raises(ClientDisconnect):
        await two
    finish.set()
    assert await one == "result"
    await three
    assert done == ["first", "three"]
