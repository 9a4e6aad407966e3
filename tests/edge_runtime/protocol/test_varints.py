"""Long lists of token ids, which are encoded and decoded with numpy, against short ones."""

from __future__ import annotations

import random

import pytest

from edge_runtime.protocol.varints import VECTORIZED_LENGTH, pack_varints, unpack_varints


@pytest.mark.parametrize("length", [VECTORIZED_LENGTH, VECTORIZED_LENGTH + 1, 5000])
@pytest.mark.parametrize("bits", [[0], [7], [8, 7], [17], [1, 7, 8, 14, 15, 21, 22, 28, 29, 35], [35]], ids=str)
def test_a_long_list_is_the_same_as_its_numbers_one_by_one(length: int, bits: list[int]) -> None:
    source = random.Random(length)
    numbers = [source.getrandbits(source.choice(bits)) for _ in range(length)]
    packed = pack_varints(numbers)
    assert packed == b"".join(pack_varints([number]) for number in numbers)
    assert unpack_varints(packed) == numbers


@pytest.mark.parametrize("bad", [b"\x80", b"\x80\x80\x80\x80\x80\x01", b"\xff" * 20], ids=repr)
@pytest.mark.parametrize("before", [b"", b"\x01" * VECTORIZED_LENGTH], ids=["short", "long"])
@pytest.mark.parametrize("after", [b"", b"\x01"], ids=["last", "within"])
def test_bad_numbers_are_refused_in_long_lists_too(bad: bytes, before: bytes, after: bytes) -> None:
    packed = before + bad + after
    if bad + after == b"\x80\x01":
        assert unpack_varints(packed)[-1] == 1 << 7
    else:
        with pytest.raises(ValueError, match="token id"):
            unpack_varints(packed)
