"""Recorded acceptance: what a draft would have guessed at every position of texts that a target wrote.

The same noise drives target and draft, so whether the draft's guess at a position, given the true text before it, is
the target's token is a fixed fact of that text. Recorded once, it replays every plan exactly. A file is one .npz:

    format          () int32, FORMAT
    made            () str, JSON: where it is from, seeds and versions
    target          (texts,) str, the target's name
    temperature, top_p, prompt, seed, length    (texts,) sampling, tokens of the prompt, seed, tokens of the text
    confidence      (positions,) float16, the draft's probability of its guess; texts one behind the other
    rank            (positions,) uint8, place of the target's token among the draft's best by coupled score: 0 is the
                    guess itself, 1 to 7 a sibling, 255 none of these
    behind          (misses, 16) float16, confidences of what the draft goes on with behind each wrong guess
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

from edge_runtime.protocol.errors import InputError

FORMAT = 1
SIBLINGS = 7
NONE = 255
BEHIND = 16
# The least and the most of each column of texts.
BOUNDS = {
    "temperature": (0, 100),
    "top_p": (1e-9, 1),
    "prompt": (1, 1 << 24),
    "seed": (0, 1 << 63),
    "length": (1, 1 << 20),
}


class Text(msgspec.Struct, frozen=True):
    """One text that a target wrote, as its draft sees it.

    Attributes:
        target: its name.
        temperature, top_p, seed: of the sampling.
        prompt: tokens in front of the text.
        confidences: for each position, the draft's probability of its guess.
        ranks: for each position, where the target's token stands among the draft's candidates: 0 the guess itself.
        behind: for each position whose guess is wrong, confidences of the guesses behind it; else empty.
    """

    target: str
    temperature: float
    top_p: float
    seed: int
    prompt: int
    confidences: list[float]
    ranks: list[int]
    behind: list[list[float]]

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def acceptance(self) -> float:
        """Share of positions at which the guess is the target's token."""
        return self.ranks.count(0) / len(self.ranks)


def runs(ranks: list[int]) -> list[int]:
    """For each position, and for the one behind the last, how many right guesses begin there."""
    run = [0] * (len(ranks) + 1)
    for index in range(len(ranks) - 1, -1, -1):
        run[index] = 0 if ranks[index] else run[index + 1] + 1
    return run


def write_texts(path: Path, texts: list[Text], made: dict[str, Any]) -> None:
    """Writes `texts`, at least one, compressed; `made` says where they are from."""
    columns: dict[str, npt.NDArray[Any]] = {
        "format": np.array(FORMAT, np.int32),
        "made": np.array(json.dumps(made, sort_keys=True)),
        "target": np.array([text.target for text in texts]),
        "temperature": np.array([text.temperature for text in texts], np.float32),
        "top_p": np.array([text.top_p for text in texts], np.float32),
        "prompt": np.array([text.prompt for text in texts], np.int32),
        "seed": np.array([text.seed for text in texts], np.int64),
        "length": np.array([len(text) for text in texts], np.int32),
        "confidence": np.array([c for text in texts for c in text.confidences], np.float16),
        "rank": np.array([rank for text in texts for rank in text.ranks], np.uint8),
        "behind": np.array([row for text in texts for row in text.behind if row], np.float16).reshape(-1, BEHIND),
    }
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **columns)
    partial.replace(path)


def read_texts(path: Path, *, target: str | None = None, temperature: float | None = None) -> list[Text]:
    """The texts of the file at `path`, all or those of one target and temperature.

    Raises:
        InputError: no such file, not an acceptance trace, or none of its texts is asked for.
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
    """Every array of the file, whatever its shape."""
    names = ("format", "made", "target", *BOUNDS, "confidence", "rank", "behind")
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {name: np.asarray(file[name]) for name in names}
    except FileNotFoundError:
        raise InputError(f"no acceptance trace at {path}: record one with `draft-export record`") from None
    except KeyError as error:
        raise _malformed(path, f"it lacks {error}") from None
    # numpy and zipfile raise all of these at bytes that are not theirs.
    except (
        OSError, ValueError, TypeError, AttributeError, EOFError, MemoryError, RuntimeError, SyntaxError,
        zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        raise _malformed(path, f"{type(error).__name__}: {error}") from None
    found = columns["format"]
    if found.shape != () or found.dtype.kind not in "iu" or int(found) != FORMAT:
        raise InputError(f"{path} has format {found!r} and this release reads {FORMAT}: record it again")
    return columns


def _texts(columns: dict[str, npt.NDArray[Any]], path: Path) -> list[Text]:
    count = columns["target"].shape[0] if columns["target"].ndim == 1 else 0
    if not count or columns["target"].dtype.kind != "U":
        raise _malformed(path, "target is not a list of names")
    for name, (least, most) in BOUNDS.items():
        column = columns[name]
        kinds = "f" if name in ("temperature", "top_p") else "iu"
        if column.shape != (count,) or column.dtype.kind not in kinds:
            raise _malformed(path, f"{name} is not one number a text")
        if not (np.isfinite(column).all() and least <= column.min() and column.max() <= most):
            raise _malformed(path, f"{name} is not within {least} and {most}")
    confidence, rank, behind = columns["confidence"], columns["rank"], columns["behind"]
    positions = int(columns["length"].sum(dtype=np.int64))
    if confidence.shape != (positions,) or rank.shape != (positions,):
        raise _malformed(path, f"its texts have {positions} positions, and confidence and rank others")
    if confidence.dtype.kind != "f" or behind.dtype.kind != "f" or rank.dtype.kind not in "iu":
        raise _malformed(path, "confidence or behind is not of floats, or rank not of integers")
    if behind.shape != (int(np.count_nonzero(rank)), BEHIND):
        raise _malformed(path, f"behind has not {BEHIND} confidences for each wrong guess")
    for name, values in (("confidence", confidence), ("behind", behind)):
        if not ((values >= 0) & (values <= 1)).all():
            raise _malformed(path, f"{name} is not within 0 and 1")
    if not (((rank >= 0) & (rank <= SIBLINGS)) | (rank == NONE)).all():
        raise _malformed(path, f"a rank is neither {NONE} nor at most {SIBLINGS}")
    texts = []
    start, misses = 0, iter(behind.astype(float).tolist())
    for index in range(count):
        end = start + int(columns["length"][index])
        ranks = rank[start:end].tolist()
        text = Text(
            str(columns["target"][index]),
            round(float(columns["temperature"][index]), 6),
            round(float(columns["top_p"][index]), 6),
            int(columns["seed"][index]),
            int(columns["prompt"][index]),
            confidence[start:end].astype(float).tolist(),
            ranks,
            [next(misses) if rank else [] for rank in ranks],
        )
        texts.append(text)
        start = end
    return texts


def _malformed(path: Path, why: str) -> InputError:
    return InputError(f"{path} is not an acceptance trace ({why}): record it again with `draft-export record`")
