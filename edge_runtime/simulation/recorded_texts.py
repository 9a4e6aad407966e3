"""Recorded acceptance: the draft's guesses at every position of texts that a target generated.

Target and draft are driven by the same noise, so whether the draft's guess at a position, given the true text before
it, equals the target's token is a fixed property of that text. One recording replays every plan exactly. A file is one
.npz:

    format          () int32, FORMAT_VERSION
    made            () str, JSON: provenance, seeds and versions
    target          (texts,) str, the target's name
    temperature, top_p, prompt, seed, length    (texts,) sampling, prompt length, seed, text length in tokens
    confidence      (positions,) float16, the draft's probability of its guess; texts concatenated
    rank            (positions,) uint8, rank of the target's token among the draft's best by coupled score: 0 is the
                    guess itself, 1 to 7 a sibling, 255 none of these
    behind          (misses, 16) float16, confidences with which the draft continues after each wrong guess
"""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.planning.plan import UNRANKED
from edge_runtime.protocol.errors import InputError

FORMAT_VERSION = 1
# Recorded siblings per guess, and guesses after each wrong guess.
MAX_SIBLINGS = 7
CONTINUATION_TOKENS = 16
# Minimum and maximum of each per-text column.
COLUMN_BOUNDS = {
    "temperature": (0, 100),
    "top_p": (1e-9, 1),
    "prompt": (1, 1 << 24),
    "seed": (0, 1 << 63),
    "length": (1, 1 << 20),
}


class RecordedText(msgspec.Struct, frozen=True):
    """One text that a target generated, as its draft sees it.

    Attributes:
        target: name of the target.
        temperature, top_p, seed: sampling parameters.
        prompt: length of the prompt in tokens.
        confidences: for each position, the draft's probability of its guess.
        ranks: for each position, rank of the target's token among the draft's candidates: 0 is the guess itself.
        continuations: for each position whose guess is wrong, confidences of the guesses after it; otherwise empty.
    """

    target: str
    temperature: float
    top_p: float
    seed: int
    prompt: int
    confidences: list[float]
    ranks: list[int]
    continuations: list[list[float]]

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def acceptance(self) -> float:
        """Share of positions at which the guess is the target's token."""
        return self.ranks.count(0) / len(self.ranks)


def accepted_runs(ranks: list[int]) -> list[int]:
    """Return, for each position and the one after the last, how many correct guesses in a row begin there."""
    run = [0] * (len(ranks) + 1)
    for index in range(len(ranks) - 1, -1, -1):
        run[index] = 0 if ranks[index] else run[index + 1] + 1
    return run


def write_texts(path: Path, texts: list[RecordedText], made: dict[str, Any]) -> None:
    """Write `texts`, at least one, compressed.

    Args:
        made: provenance, JSON-compatible.
    """
    columns: dict[str, npt.NDArray[Any]] = {
        "format": np.array(FORMAT_VERSION, np.int32),
        "made": np.array(json.dumps(made, sort_keys=True)),
        "target": np.array([text.target for text in texts]),
        "temperature": np.array([text.temperature for text in texts], np.float32),
        "top_p": np.array([text.top_p for text in texts], np.float32),
        "prompt": np.array([text.prompt for text in texts], np.int32),
        "seed": np.array([text.seed for text in texts], np.int64),
        "length": np.array([len(text) for text in texts], np.int32),
        "confidence": np.array([c for text in texts for c in text.confidences], np.float16),
        "rank": np.array([rank for text in texts for rank in text.ranks], np.uint8),
        "behind": np.array([row for text in texts for row in text.continuations if row], np.float16).reshape(
            -1, CONTINUATION_TOKENS
        ),
    }
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **columns)
    partial.replace(path)


def read_texts(path: Path, *, target: str | None = None, temperature: float | None = None) -> list[RecordedText]:
    """Read the texts of a file, all or those of one target and temperature.

    Raises:
        InputError: there is no such file, it is not an acceptance trace, or it has no such text.
    """
    texts = _texts(_columns(path), path)
    wanted = [
        text
        for text in texts
        if (target is None or text.target == target)
        and (temperature is None or abs(text.temperature - temperature) < 1e-6)
    ]
    if not wanted:
        known = sorted({(text.target, round(text.temperature, 6)) for text in texts})
        raise InputError(f"{path} has no text of {target or 'any target'} at temperature {temperature}; it has {known}")
    return wanted


def _columns(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read every array of the file; shapes are not checked."""
    names = ("format", "made", "target", *COLUMN_BOUNDS, "confidence", "rank", "behind")
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {name: np.asarray(file[name]) for name in names}
    except FileNotFoundError:
        raise InputError(f"no acceptance trace at {path}: record one with `draft-export record`") from None
    except KeyError as error:
        raise _malformed(path, f"it lacks {error}") from None
    # numpy and zipfile raise all of these for malformed files.
    except (
        OSError, ValueError, TypeError, AttributeError, EOFError, MemoryError, RuntimeError, SyntaxError,
        zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        raise _malformed(path, f"{type(error).__name__}: {error}") from None
    found = columns["format"]
    if found.shape != () or found.dtype.kind not in "iu" or int(found) != FORMAT_VERSION:
        raise InputError(f"{path} has format {found!r} and this release reads {FORMAT_VERSION}: record it again")
    return columns


def _texts(columns: dict[str, npt.NDArray[Any]], path: Path) -> list[RecordedText]:
    count = columns["target"].shape[0] if columns["target"].ndim == 1 else 0
    if not count or columns["target"].dtype.kind != "U":
        raise _malformed(path, "target is not a list of names")
    for name, (low, high) in COLUMN_BOUNDS.items():
        column = columns[name]
        kinds = "f" if name in ("temperature", "top_p") else "iu"
        if column.shape != (count,) or column.dtype.kind not in kinds:
            raise _malformed(path, f"{name} is not one number per text")
        if not (np.isfinite(column).all() and low <= column.min() and column.max() <= high):
            raise _malformed(path, f"{name} is not within {low} and {high}")
    confidence, rank, behind = columns["confidence"], columns["rank"], columns["behind"]
    positions = int(columns["length"].sum(dtype=np.int64))
    if confidence.shape != (positions,) or rank.shape != (positions,):
        raise _malformed(path, f"its texts have {positions} positions, but confidence and rank do not")
    if confidence.dtype.kind != "f" or behind.dtype.kind != "f" or rank.dtype.kind not in "iu":
        raise _malformed(path, "confidence or behind is not of floats, or rank not of integers")
    if behind.shape != (int(np.count_nonzero(rank)), CONTINUATION_TOKENS):
        raise _malformed(path, f"behind does not have {CONTINUATION_TOKENS} confidences for each wrong guess")
    for name, values in (("confidence", confidence), ("behind", behind)):
        if not ((values >= 0) & (values <= 1)).all():
            raise _malformed(path, f"{name} is not within 0 and 1")
    if not (((rank >= 0) & (rank <= MAX_SIBLINGS)) | (rank == UNRANKED)).all():
        raise _malformed(path, f"a rank is neither {UNRANKED} nor at most {MAX_SIBLINGS}")
    texts = []
    start, misses = 0, iter(behind.astype(float).tolist())
    for index in range(count):
        end = start + int(columns["length"][index])
        ranks = rank[start:end].tolist()
        text = RecordedText(
            target=str(columns["target"][index]),
            temperature=round(float(columns["temperature"][index]), 6),
            top_p=round(float(columns["top_p"][index]), 6),
            seed=int(columns["seed"][index]),
            prompt=int(columns["prompt"][index]),
            confidences=confidence[start:end].astype(float).tolist(),
            ranks=ranks,
            continuations=[next(misses) if rank else [] for rank in ranks],
        )
        texts.append(text)
        start = end
    return texts


def _malformed(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is not an acceptance trace ({reason}): record it again with `draft-export record`")
