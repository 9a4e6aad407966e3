"""The text of a distillation: given files, samples and chats, with their shares, and what is held out of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from cloud_verifier.acceptance.measure import TEMPERATURES
from cloud_verifier.model.target import load_model
from edge_runtime.protocol.errors import InputError
from export.data.token_stream import DOCUMENT_SEPARATOR
from export.draft import chats
from export.draft.distillation_config import DistillationConfig
from export.draft.training import TrainingSchedule
from export.draft.training_text import SAMPLES_SHARE, TrainingText
from tests.models import save_chat_target

CPU = torch.device("cpu")
LENGTH = 48
END = 2
# Each document has a letter of its own.
DOCUMENTS = [chr(ord("A") + number) * 60 for number in range(26)]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "CPU_ROWS", 4)
    monkeypatch.setattr(chats, "MAX_USER_TOKENS", 8)


@pytest.fixture(scope="module")
def target_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_target(tmp_path_factory.mktemp("text") / "target", num_hidden_layers=1)


@pytest.fixture(scope="module")
def target(target_path: Path) -> PreTrainedModel:
    model: PreTrainedModel = load_model(target_path, "cpu", torch.float32)[0]
    return model


@pytest.fixture
def config(target_path: Path, tmp_path: Path) -> DistillationConfig:
    text = tmp_path / "text.txt"
    text.write_text(DOCUMENT_SEPARATOR.join(DOCUMENTS))
    return DistillationConfig(
        target=target_path, plan=TrainingSchedule(1, 1e-3, 4, LENGTH), texts=(text,), evaluated_chats=2
    )


def gather(config: DistillationConfig, target: PreTrainedModel, scratch: Path) -> TrainingText:
    scratch.mkdir(exist_ok=True)
    return TrainingText.gather(config, config.target, target, scratch, CPU)


def shares(text: TrainingText) -> list[float]:
    return [share for _, share in text.training.parts]


def test_every_twentieth_document_is_held_out(
    config: DistillationConfig, target: PreTrainedModel, tmp_path: Path
) -> None:
    text = gather(config, target, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(config.target)
    ((stream, share),) = text.training.parts
    held_out = DOCUMENTS[10]
    expected = [tokenizer(document)["input_ids"] + [END] for document in DOCUMENTS if document != held_out]
    assert stream.ids.tolist() == [token for ids in expected for token in ids]
    assert (text.tokens, share) == (25 * 61, 1.0)
    # One whole window of 48 of its 61 tokens; its first token has nothing before it.
    assert text.held_out_windows == [(tokenizer(held_out[:LENGTH])["input_ids"], 1)]
    assert text.held_out_chats == {}


def test_one_long_document_is_cut_into_pieces(
    config: DistillationConfig, target: PreTrainedModel, tmp_path: Path
) -> None:
    (tmp_path / "long").write_text("".join(DOCUMENTS) * 2)
    text = gather(replace(config, texts=(tmp_path / "long",)), target, tmp_path)
    assert text.tokens > 0.9 * 26 * 60 * 2
    assert text.held_out_windows


def test_files_of_a_directory_are_read_in_order_without_binary_ones(
    config: DistillationConfig, target: PreTrainedModel, tmp_path: Path
) -> None:
    directory = tmp_path / "corpus"
    (directory / "deep").mkdir(parents=True)
    for index, name in enumerate(("a.txt", "deep/b.txt", "z.txt")):
        (directory / name).write_text(DOCUMENT_SEPARATOR.join(DOCUMENTS[index * 8 : index * 8 + 8]))
    whole = gather(replace(config, texts=(directory,)), target, tmp_path)
    (directory / "image").write_bytes(b"\xff\xfe\x00")
    again = gather(replace(config, texts=(directory,)), target, tmp_path)
    assert whole.tokens == again.tokens == 23 * 61
    assert torch.equal(whole.training.parts[0][0].ids, again.training.parts[0][0].ids)


def test_chats_alone(config: DistillationConfig, target: PreTrainedModel, tmp_path: Path) -> None:
    text = gather(replace(config, texts=(), chats=6), target, tmp_path)
    ((stream, share),) = text.training.parts
    assert (share, text.tokens, text.held_out_windows) == (1.0, len(stream.ids), [])
    assert tuple(text.held_out_chats) == TEMPERATURES
    written = AutoTokenizer.from_pretrained(config.target).decode(stream.ids)
    assert written.startswith("<|im_start|>user\n")
    for rows in text.held_out_chats.values():
        assert len(rows) == 2
        for ids, start in rows:
            assert 0 < start < len(ids)
            # Held-out chats have seeds of their own.
            assert AutoTokenizer.from_pretrained(config.target).decode(ids) not in written


@pytest.mark.slow
def test_shares_of_text_samples_and_chats(config: DistillationConfig, target: PreTrainedModel, tmp_path: Path) -> None:
    both = gather(replace(config, chats=6), target, tmp_path / "both")
    assert shares(both) == [config.text_share, 1 - config.text_share]
    sampled = replace(config, samples=300)
    text = gather(sampled, target, tmp_path / "sampled")
    assert shares(text) == [1 - SAMPLES_SHARE, SAMPLES_SHARE]
    # Two batches of 4 rows of 48 tokens and an end.
    assert len(text.training.parts[1][0].ids) == 2 * 4 * (LENGTH + 1)
    all_kinds = gather(replace(sampled, chats=6), target, tmp_path / "all")
    assert sum(shares(all_kinds)) == pytest.approx(1)
    assert shares(all_kinds)[:2] == [config.text_share * (1 - SAMPLES_SHARE), config.text_share * SAMPLES_SHARE]
    assert all_kinds.tokens == sum(len(stream.ids) for stream, _ in all_kinds.training.parts)


def test_chats_that_are_kept_serve_further_trainings(
    config: DistillationConfig, target: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = replace(config, chats=6, chats_directory=tmp_path / "chats")
    first = gather(kept, target, tmp_path / "first")

    def fail(*_: object) -> None:
        raise AssertionError("a chat was written again")

    monkeypatch.setattr(chats.ChatWriter, "_write_batch", fail)
    second = gather(kept, target, tmp_path / "second")
    assert torch.equal(first.training.parts[1][0].ids, second.training.parts[1][0].ids)
    assert first.held_out_chats == second.held_out_chats


@pytest.mark.slow
def test_too_few_chats_are_an_error(config: DistillationConfig, target: PreTrainedModel, tmp_path: Path) -> None:
    few = replace(config, texts=(), chats=1, plan=TrainingSchedule(1, 1e-3, 4, 400))
    with pytest.raises(InputError, match="1 chats give no text of 400 tokens: ask for more chats"):
        gather(few, target, tmp_path)
