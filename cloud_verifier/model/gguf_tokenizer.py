"""Rebuilds the Hugging Face tokenizer of a GGUF file.

A GGUF file stores a tokenizer as a vocabulary with merges (byte-level BPE) or with scores (SentencePiece), and names
its pre-tokenizer, which decides the ids of most texts, only by a family: `tokenizer.ggml.pre`. The families and their
regular expressions are those of llama.cpp (`llama-vocab.cpp`), written as the models' own `tokenizer.json` files write
them. A family that is not listed is refused, as is a vocabulary that contradicts its family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from edge_runtime.protocol.errors import TargetError

# Types of tokens in `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Below this many merges a vocabulary is too small to contradict a family.
MIN_JUDGED_MERGES = 10_000
# Share of a vocabulary's tokens that its own pre-tokenizer leaves whole: a BPE is trained within pre-tokens. Measured:
# 1.000 for SmolLM2, Llama 3, Llama 4 and Mistral's Tekken, 0.989 for Qwen 2. GPT-2's
# family leaves 0.82 to 0.90 of the last four's.
MIN_WHOLE_SHARE = 0.98
# What a rebuilt tokenizer must give back: words, digits, contractions, white space, several scripts, an emoji, code.
SAMPLE_TEXT = (
    "The quick brown fox can't jump over 12345 lazy dogs' 3.14 tails.\n\n  Grüße, señor! Привет, мир: 你好世界 "
    "こんにちは 안녕 \U0001f600\n\tfor i in range(10):\n\t\tprint(f\"{i:>4}\")  # I'LL see, we've 'd\r\nEnd"
)


@dataclass(frozen=True)
class TokenizerFamily:
    """How a family of byte-level BPE tokenizers cuts a text into pre-tokens.

    Attributes:
        pattern: regular expression of the pre-tokens; empty for GPT-2's.
        digits: single digits are pre-tokens of their own.
        normalize: the text is normalized to NFC first.
        ignore_merges: a pre-token that is in the vocabulary is one token, whatever the merges say.
        add_bos: texts begin with the BOS token unless the file says otherwise.
    """

    pattern: str = ""
    digits: bool = False
    normalize: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        if self.pattern:
            return pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(self.pattern), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if not self.digits:
            return byte_level
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


LLAMA3 = TokenizerFamily(
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{TAIL}", ignore_merges=True, add_bos=True
)
QWEN2 = TokenizerFamily(rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{TAIL}", normalize=True)
SINGLE_DIGITS = TokenizerFamily(digits=True)
GPT2 = TokenizerFamily()
TEKKEN = TokenizerFamily(rf"{'|'.join(CASED_WORDS)}|\p{{N}}|{CASED_TAIL}", ignore_merges=True, add_bos=True)
GPT4O = TokenizerFamily(rf"{'|'.join(words + CONTRACTIONS + '?' for words in CASED_WORDS)}|\p{{N}}{{1,3}}|{CASED_TAIL}")

FAMILIES: Mapping[str, TokenizerFamily] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), QWEN2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), SINGLE_DIGITS),
    "command-r": TokenizerFamily(digits=True, normalize=True),
    **dict.fromkeys(("gpt-2", "phi-2", "jais"), GPT2),
    **dict.fromkeys(("olmo", "mpt"), TokenizerFamily(normalize=True)),
    "stablelm2": TokenizerFamily(QWEN2.pattern),
    "smaug-bpe": TokenizerFamily(LLAMA3.pattern),
    "dbrx": TokenizerFamily(LLAMA3.pattern),
    "tekken": TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), GPT4O),
}


class GgufTokenizer:
    """The tokenizer of a GGUF file.

    Attributes:
        special: text of the special tokens by role: `bos_token`, `eos_token`, `pad_token`, `unk_token`.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        """Rebuild and check the tokenizer.

        Args:
            metadata: the file's metadata, by key.

        Raises:
            TargetError: the tokenizer is of an unknown kind, or fails the check.
        """
        self._metadata = metadata
        self._tokens: list[str] = list(self._field("tokens", ()))
        if not self._tokens:
            raise TargetError("it holds no tokenizer: convert it again with llama.cpp's convert_hf_to_gguf.py")
        self._types: list[int] = list(self._field("token_type", [NORMAL] * len(self._tokens)))
        self.special = {
            f"{role}_token": self._tokens[index]
            for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
            if (index := self._field(f"{key}_token_id", None)) is not None and index < len(self._tokens)
        }
        kind = self._field("model", None)
        if kind == "gpt2":
            self.tokenizer = self._byte_level_bpe()
        elif kind == "llama":
            self.tokenizer = self._sentencepiece()
        else:
            raise TargetError(
                f"its tokenizer is of the kind {kind!r}; gpt2 (byte-level BPE) and llama (SentencePiece) can be "
                "rebuilt: use the model's Hugging Face directory instead"
            )
        self._check()

    def _field(self, key: str, default: Any) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def _byte_level_bpe(self) -> Tokenizer:
        name = self._field("pre", None)
        family = FAMILIES.get(name)
        if family is None:
            known = ", ".join(sorted(FAMILIES))
            found = "does not name its pre-tokenizer" if name is None else f"names the pre-tokenizer {name!r}"
            raise TargetError(
                f"it {found} (tokenizer.ggml.pre), and another one would give other ids; known are {known}: use the "
                "model's Hugging Face directory instead, or convert it again with a current llama.cpp"
            )
        vocabulary = {token: index for index, token in enumerate(self._tokens) if self._types[index] != UNUSED}
        merges = [_split_merge(merge) for merge in self._field("merges", ())]
        model = models.BPE(vocabulary, merges, ignore_merges=family.ignore_merges)
        tokenizer = Tokenizer(model)
        if family.normalize:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = family.pre_tokenizer()
        tokenizer.decoder = decoders.ByteLevel()
        self._judge_family(str(name), tokenizer.pre_tokenizer, len(merges))
        self._finish(tokenizer, add_bos=family.add_bos)
        return tokenizer

    def _sentencepiece(self) -> Tokenizer:
        """SentencePiece's BPE with byte fallback, as transformers converts those of Llama 2, Mistral and Gemma."""
        add_prefix = bool(self._field("add_space_prefix", True))
        # llama.cpp writes user-defined white space as blanks; the vocabulary has U+2581 for a blank.
        self._tokens = [
            token.replace(" ", "▁") if kind == USER_DEFINED and not token.strip(" ") else token
            for token, kind in zip(self._tokens, self._types, strict=True)
        ]
        vocabulary = {token: index for index, token in enumerate(self._tokens)}
        scores = self._field("scores", None)
        if scores is None:
            raise TargetError("its SentencePiece tokenizer has no scores: use the model's Hugging Face directory")
        pieces = [
            (token, float(score))
            for token, score, kind in zip(self._tokens, scores, self._types, strict=True)
            if kind in (NORMAL, USER_DEFINED)
        ]
        model = models.BPE(
            vocabulary,
            _merges_of_scores(pieces, vocabulary),
            unk_token=self.special.get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        )
        tokenizer = Tokenizer(model)
        to_pieces = normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), to_pieces]) if add_prefix else to_pieces
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if add_prefix else steps)
        self._finish(tokenizer, add_bos=True)
        return tokenizer

    def _finish(self, tokenizer: Tokenizer, *, add_bos: bool) -> None:
        """Add the special tokens, and what is put before and after a text."""
        added = [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(self._tokens, self._types, strict=True)
            if kind in (CONTROL, USER_DEFINED, UNKNOWN) and token.strip("▁")
        ]
        tokenizer.add_tokens(added)
        around = ["$A"]
        if self._field("add_bos_token", add_bos) and "bos_token" in self.special:
            around.insert(0, self.special["bos_token"])
        if self._field("add_eos_token", False) and "eos_token" in self.special:
            around.append(self.special["eos_token"])
        if len(around) > 1:
            used = [(token, self._tokens.index(token)) for token in dict.fromkeys(around) if token != "$A"]
            tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)

    def _judge_family(self, name: str, pre_tokenizer: pre_tokenizers.PreTokenizer, merges: int) -> None:
        """Raise TargetError if the vocabulary cannot have been trained with this pre-tokenizer."""
        if merges < MIN_JUDGED_MERGES:
            return
        normal = [token for token, kind in zip(self._tokens, self._types, strict=True) if kind == NORMAL]
        texts = [text for text in map(_decode_bytes, normal) if text is not None]
        whole = sum(len(pre_tokenizer.pre_tokenize_str(text)) == 1 for text in texts) / len(texts)
        longest = max((len(text) for text in texts if text.isascii() and text.isdigit()), default=0)
        allowed = max(len(part) for part, _ in pre_tokenizer.pre_tokenize_str("1234567890"))
        # A pre-tokenizer that keeps digits together would have led to tokens of several digits.
        if whole < MIN_WHOLE_SHARE or not min(allowed, 2) <= longest <= allowed:
            raise TargetError(
                f"its vocabulary contradicts its pre-tokenizer {name!r}, which leaves {whole:.1%} of the tokens whole "
                f"and up to {allowed} digits together (the vocabulary: {longest}): the file is mislabelled; use the "
                "model's Hugging Face directory"
            )

    def _check(self) -> None:
        """Raise TargetError if the tokenizer loses text, or gives a token an id that is not the file's."""
        for index, token in enumerate(self._tokens):
            if self._types[index] != UNUSED and self.tokenizer.token_to_id(token) != index:
                other = self.tokenizer.token_to_id(token)
                raise TargetError(f"its tokenizer has the token {token!r} twice, as {index} and {other}")
        ids = self.tokenizer.encode(SAMPLE_TEXT, add_special_tokens=False).ids
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        # A vocabulary without a letter of a foreign script, and without bytes, has nothing to give back for it.
        unknown = self.special.get("unk_token")
        if text != SAMPLE_TEXT and (unknown is None or self._tokens.index(unknown) not in ids):
            raise TargetError(f"its rebuilt tokenizer does not give back a text: {SAMPLE_TEXT!r} became {text!r}")
        for index, token in enumerate(self._tokens):
            if self._types[index] == CONTROL:
                found = self.tokenizer.encode(token, add_special_tokens=False).ids
                if found != [index]:
                    raise TargetError(f"its rebuilt tokenizer encodes the special token {token!r} as {found}")


def _split_merge(merge: str) -> tuple[str, str]:
    # A piece may not contain a blank: byte-level BPE writes it as U+0120.
    left, _, right = merge.partition(" ")
    return left, right


def _merges_of_scores(pieces: Sequence[tuple[str, float]], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Merges that reproduce SentencePiece's BPE: the pair whose result has the highest score goes first."""
    known = {piece for piece, _ in pieces}
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, score in pieces:
        splits = ((piece[:end], piece[end:]) for end in range(1, len(piece)))
        pairs = [(left, right) for left, right in splits if left in known and right in known]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(-score, -len(left), -len(right), left, right) for left, right in pairs]
    merges.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in merges]


def _byte_characters() -> dict[str, int]:
    """GPT-2's table: the printable character that stands for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_characters()


def _decode_bytes(token: str) -> str | None:
    """The text of a byte-level token; None if its bytes are not a text by themselves."""
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return None
