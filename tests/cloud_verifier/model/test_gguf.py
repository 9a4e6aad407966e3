"""GGUF files become the Hugging Face directories that they were made from: weights, configuration, tokenizer."""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import GPT2Converter, Qwen2Converter, TikTokenConverter

from cloud_verifier.cli.main import main
from cloud_verifier.model import gguf as gguf_conversion
from cloud_verifier.model import gguf_tokenizer
from cloud_verifier.model.converted_checkpoints import is_gguf, resolve_checkpoint
from cloud_verifier.model.gguf import convert_gguf
from cloud_verifier.model.loading import TargetLoader
from edge_runtime.protocol.errors import TargetError
from export.cli.main import main as export_main
from tests.models import save_target

# Text with words and numbers that no change of this project changes.
PROSE = "".join(inspect.getsource(module) for module in (statistics, datetime, argparse))
TEXTS = (
    *(
        "I'LL say it's 12345 things — don't.\n\n\tx = 007  # über\r\n",
        "  leading, trailing  ",
        "Grüße 你好 мир 1٢3 \U0001f600",
    ),
    *("def main(argv: list[str]) -> int:\n    return 42\n", PROSE[:2000]),
)
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BYTE_LEVEL = pre_tokenizers.ByteLevel.alphabet()

# How the models themselves, or transformers' converters for them, cut texts.
ORIGINALS: dict[str, Callable[[dict[str, int], list[tuple[str, str]]], Tokenizer]] = {
    "gpt-2": lambda vocabulary, merges: GPT2Converter(None).converted(vocabulary, merges),
    "qwen2": lambda vocabulary, merges: Qwen2Converter(None).converted(vocabulary, merges),
    "llama-bpe": lambda vocabulary, merges: _tiktoken(vocabulary, merges),
    "smollm": lambda vocabulary, merges: _single_digits(vocabulary, merges),
}


def _tiktoken(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """As transformers converts Llama 3's tokenizer, except for the file that it reads the ranks from."""
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    pattern = TikTokenConverter(vocab_file="").pattern
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _single_digits(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """SmolLM2's tokenizer.json."""
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def trained() -> dict[str, dict[str, Any]]:
    """For each family, metadata of a GGUF file with a vocabulary of 1000 tokens trained with its pre-tokenizer."""
    found = {}
    for name, build in ORIGINALS.items():
        # Any vocabulary: training replaces it.
        tokenizer = build({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
        trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=BYTE_LEVEL, show_progress=False)
        tokenizer.train_from_iterator([PROSE], trainer)
        model = json.loads(tokenizer.to_str())["model"]
        tokens = [*SPECIALS, *sorted(model["vocab"], key=lambda token: model["vocab"][token])]
        found[name] = {
            "model": "gpt2",
            "pre": name,
            "tokens": tokens,
            "token_type": [gguf_tokenizer.CONTROL] * len(SPECIALS) + [gguf_tokenizer.NORMAL] * (len(tokens) - 3),
            "merges": [" ".join(merge) for merge in model["merges"]],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "padding_token_id": 2,
            "unknown_token_id": 0,
        }
    return found


def fields(metadata: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}


@pytest.mark.parametrize("family", ORIGINALS)
def test_a_byte_level_tokenizer_is_the_original(family: str, trained: dict[str, dict[str, Any]]) -> None:
    metadata = trained[family]
    vocabulary = {token: index for index, token in enumerate(metadata["tokens"])}
    original = ORIGINALS[family](vocabulary, [tuple(merge.split(" ")) for merge in metadata["merges"]])
    original.add_special_tokens(list(SPECIALS))
    rebuilt = gguf_tokenizer.GgufTokenizer(fields(metadata)).tokenizer
    for text in (*TEXTS, "<|im_start|>user\nHi<|im_end|>"):
        ids = rebuilt.encode(text, add_special_tokens=False).ids
        assert ids == original.encode(text, add_special_tokens=False).ids
        assert rebuilt.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)
    assert rebuilt.get_vocab() == original.get_vocab()
    # Llama 3 begins texts with BOS, the others do not.
    assert (rebuilt.encode("a").ids[0] == 1) == (family == "llama-bpe")


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_a_sentencepiece_tokenizer_is_the_original(add_space_prefix: bool) -> None:
    """Trained by the library `tokenizers` in Llama 2's form; the file has scores instead of merges."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    original = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    blanks = normalizers.Replace(" ", "▁")
    original.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks]) if add_space_prefix else blanks
    original.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=specials, show_progress=False)
    original.train_from_iterator([PROSE], trainer)
    original.pre_tokenizer = None
    vocabulary = original.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merged = {"".join(merge): rank for rank, merge in enumerate(json.loads(original.to_str())["model"]["merges"])}
    kinds = [gguf_tokenizer.UNKNOWN, gguf_tokenizer.CONTROL, gguf_tokenizer.CONTROL, *[gguf_tokenizer.BYTE] * 256]
    rebuilt = gguf_tokenizer.GgufTokenizer(
        fields(
            {
                "model": "llama",
                "tokens": tokens,
                "token_type": [*kinds, *[gguf_tokenizer.NORMAL] * (len(tokens) - len(kinds))],
                "scores": [-float(merged.get(token, 1_000_000)) for token in tokens],
                "bos_token_id": 1,
                "eos_token_id": 2,
                "unknown_token_id": 0,
                "add_space_prefix": add_space_prefix,
            }
        )
    ).tokenizer
    for text in TEXTS:
        ids = rebuilt.encode(text, add_special_tokens=False).ids
        assert ids == original.encode(text, add_special_tokens=False).ids
        assert rebuilt.decode(ids) == text
        assert rebuilt.encode(text).ids == [1, *ids]


@pytest.mark.parametrize("label", ["gpt-2", "smollm"])
def test_a_vocabulary_that_contradicts_its_family_is_refused(
    label: str, trained: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_tokenizer, "MIN_JUDGED_MERGES", 500)
    for family, metadata in trained.items():
        if family == label:
            gguf_tokenizer.GgufTokenizer(fields(metadata))
    # This vocabulary has tokens of two digits if and only if its pre-tokenizer kept digits together.
    other = {"gpt-2": "smollm", "smollm": "llama-bpe"}[label]
    with pytest.raises(TargetError, match="contradicts its pre-tokenizer"):
        gguf_tokenizer.GgufTokenizer(fields({**trained[other], "pre": label}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "brand-new"}, "names the pre-tokenizer 'brand-new'.*known are.*smollm"),
        ({"pre": None}, "does not name its pre-tokenizer"),
        ({"model": "bert"}, "of the kind 'bert'"),
        ({"tokens": []}, "holds no tokenizer"),
    ],
)
def test_an_unknown_tokenizer_is_refused(
    change: dict[str, Any], message: str, trained: dict[str, dict[str, Any]]
) -> None:
    with pytest.raises(TargetError, match=message):
        gguf_tokenizer.GgufTokenizer(fields({**trained["smollm"], **change}))


def write_gguf(
    path: Path,
    directory: Path,
    tokenizer: dict[str, Any],
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    settings: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write the model in `directory` as llama.cpp's converter does, with its names and its order of rotated columns."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config, architecture = model.config, model.config.model_type
    stored = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": (stored.get("rope_parameters") or stored)["rope_theta"],
        "vocab_size": config.vocab_size,
        **({"rope.dimension_count": 16} if architecture == "llama" else {"attention.key_length": 16}),
        **(settings or {}),
    }
    for name, value in values.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{name}", value)
    for name, value in tokenizer.items():
        if isinstance(value, list):
            writer.add_array(f"tokenizer.ggml.{name}", value)
        else:
            (writer.add_uint32 if isinstance(value, int) else writer.add_string)(f"tokenizer.ggml.{name}", value)
    writer.add_chat_template(TEMPLATE)
    (number,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        data = parameter.detach().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if part in name and architecture == "llama":
                data = data.reshape(count, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        stored = gguf.quants.quantize(data, kind) if data.ndim > 1 else data
        writer.add_tensor(
            names.get_name(name, (".weight", ".bias")),
            stored,
            raw_dtype=kind if data.ndim > 1 else None,
        )
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def convert(tmp_path: Path, trained: dict[str, dict[str, Any]]) -> Iterator[Callable[..., tuple[Path, Path]]]:
    """`convert(model_type, config_changes, **write_gguf_options)`: the original directory, and the converted one."""

    def run(model_type: str, changes: dict[str, Any] | None = None, **options: Any) -> tuple[Path, Path]:
        tokenizer = trained["smollm"]
        size = {"vocab_size": len(tokenizer["tokens"])}
        original = save_target(tmp_path / "original", model_type, **(size | (changes or {})))
        path = write_gguf(tmp_path / "tiny.gguf", original, tokenizer, **options)
        convert_gguf(path, tmp_path / "converted")
        return original, tmp_path / "converted"

    yield run
    assert not list(tmp_path.glob(".*partial"))


def logits(directory: Path, ids: Sequence[int] = range(200)) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(ids)])).logits[0]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_an_unquantized_model_is_the_original(model_type: str, tied: bool, convert: Callable[..., Any]) -> None:
    original, converted = convert(model_type, {"tie_word_embeddings": tied})
    assert torch.equal(logits(converted), logits(original))


def test_a_large_model_is_written_in_shards(convert: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_conversion, "SHARD_BYTES", 100_000)
    original, converted = convert("llama")
    assert len(list(converted.glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(logits(converted), logits(original))


SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"factor": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 64},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
    ),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_rope_is_the_original(kind: str, convert: Callable[..., Any]) -> None:
    scaling, settings = SCALINGS[kind]
    original, converted = convert("llama", {"rope_scaling": {"rope_type": kind, **scaling}}, settings=settings)
    assert torch.equal(logits(converted), logits(original))


def test_the_rope_of_llama_3_is_recognized_by_its_factors(convert: Callable[..., Any]) -> None:
    """llama.cpp stores what the rule yields: the quotient of each plain and scaled frequency."""
    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    changes = {"rope_scaling": {"rope_type": "llama3", **scaling}, "rope_theta": 500_000.0}
    wavelengths = 2 * np.pi * 500_000.0 ** (np.arange(0, 16, 2) / 16)
    smooth = ((8192 / wavelengths - 1) / 3).clip(0, 1)
    factors = (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32)
    original, converted = convert("llama", changes, tensors={"rope_freqs.weight": factors})
    torch.testing.assert_close(logits(converted), logits(original))
    assert json.loads((converted / "config.json").read_text())["rope_scaling"] == {"rope_type": "llama3", **scaling}


def test_a_quantized_model_is_stored_in_bfloat16_and_has_tokenizer_template_and_end_tokens(
    convert: Callable[..., Any],
) -> None:
    original, converted = convert("llama", kind=gguf.GGMLQuantizationType.Q8_0)
    model = AutoModelForCausalLM.from_pretrained(converted, dtype="auto")
    assert model.dtype == torch.bfloat16
    agreement = (logits(converted).argmax(-1) == logits(original).argmax(-1)).float().mean()
    assert agreement > 0.9
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (SPECIALS[1], SPECIALS[2], SPECIALS[2])
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi 12"}], tokenize=False)
    assert text == "<|im_start|>Hi 12<|im_end|>"
    assert tokenizer(text).keys() == {"input_ids", "attention_mask"}
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {"attention.scale": 0.5}}, "sets llama.attention.scale, which would be ignored"),
        ({"settings": {"rope.scaling.type": "su", "rope.scaling.factor": 2.0}}, "scales RoPE by 'su'"),
        ({"settings": {"expert_count": 8}}, "mixtures of experts"),
        ({"settings": {"split.count": 2}}, "llama.split.count"),
        ({"settings": {"block_count": 10**9}}, r"Expected `int` <= 1024 - at `\$\.num_hidden_layers`"),
        ({"settings": {"context_length": 10**9}}, r"Expected `int` <= \d+ - at `\$\.max_position_embeddings`"),
        ({"tensors": {"rope_freqs.weight": np.full(8, 3, np.float32)}}, "follow no rule"),
        (
            {"tensors": {"blk.0.extra.weight": np.ones((4, 4), np.float32)}},
            r"holds blk.0.extra.weight of the shape \[4, 4\]",
        ),
    ],
)
def test_what_would_be_lost_is_refused(options: dict[str, Any], message: str, convert: Callable[..., Any]) -> None:
    with pytest.raises(TargetError, match=message):
        convert("llama", **options)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    assert is_gguf(path)
    with pytest.raises(TargetError, match=r"damaged.gguf cannot be converted: it is damaged"):
        convert_gguf(path, tmp_path / "converted")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_commands_take_gguf_files_and_convert_them_once(
    tmp_path: Path,
    trained: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    original = save_target(tmp_path / "original", vocab_size=len(trained["smollm"]["tokens"]))
    path = write_gguf(tmp_path / "tiny.Q8_0.gguf", original, trained["smollm"])
    target = TargetLoader().load_single(path)
    assert target.name == "tiny.Q8_0"
    directory = resolve_checkpoint(path)
    written = (directory / "config.json").stat().st_mtime_ns
    assert main(["generate", str(path), "def main", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("def main")
    assert export_main(["onnx", str(path), str(path), "--output", str(tmp_path / "bundle"), "--positions", "40"]) == 0
    assert [path.name for path in (tmp_path / "cache/flexspec/gguf").iterdir() if path.is_dir()] == [directory.name]
    assert (directory / "config.json").stat().st_mtime_ns == written
