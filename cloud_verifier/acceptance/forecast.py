"""Forecasts a deployed draft's acceptance by a target version before the version is rolled out.

All versions are measured on the same positions, so that the difference between two of them is known more precisely than
either figure. The text to follow ships with the package (`acceptance.measure.read_calibration_text`); a text of the
operator's own traffic (`--text`) predicts better.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from cloud_verifier.acceptance.bootstrap import Bootstrap, Interval
from cloud_verifier.acceptance.measure import (
    Passage,
    choose_tokens,
    count_accepted,
    judged_logits,
    propose_tokens,
    read_calibration_text,
)
from cloud_verifier.model.target import load_model
from cloud_verifier.registry.checkpoint import accepted_vocabularies, base_directory, load_tokenizer
from edge_runtime.draft import OnnxDraft
from edge_runtime.protocol.bundle import read_bundle
from edge_runtime.protocol.errors import InputError, TargetError
from edge_runtime.protocol.sampling import Sampling

TEMPERATURES = (0.0, 1.0)
# Tokens of a passage: the first are only prefilled, the rest is judged.
PREFILL_TOKENS, JUDGED_TOKENS = 64, 128
# Chosen: some 6000 judged positions, which takes a draft of 20M parameters less than a minute on a CPU.
MAX_PASSAGES = 48
# Passages are what the bootstrap resamples; with fewer than this the intervals mean nothing.
MIN_PASSAGES = 8
RESAMPLES = 2000


class ForecastRow(msgspec.Struct, frozen=True):
    """Forecast at one temperature, as shares of the judged positions.

    Attributes:
        acceptance: acceptance rate by each version, in the order of `AcceptanceForecast.versions`.
        change: acceptance rate by the first version minus that by the last; None if there is one version only.
    """

    temperature: float
    acceptance: list[Interval] = msgspec.field(name="of")
    change: Interval | None


class AcceptanceForecast(msgspec.Struct, frozen=True):
    """Forecast acceptance of one draft by one or more target versions.

    Attributes:
        draft: directory of the bundle.
        versions: names of the versions.
        positions: number of judged positions.
        passages: number of passages that they come from.
        expectations: one row for each temperature.
    """

    draft: str
    versions: list[str]
    positions: int
    passages: int
    expectations: list[ForecastRow]

    @property
    def loss(self) -> float:
        """Largest loss of acceptance from the last version to the first, in percentage points; negative for a gain."""
        return max((-100 * row.change.value for row in self.expectations if row.change is not None), default=0.0)


def forecast(
    bundle: Path,
    versions: Sequence[tuple[str, Path]],
    text: Path | None = None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 0,
) -> AcceptanceForecast:
    """Measure the draft in `bundle` against each of `versions`, which are loaded one after the other.

    Args:
        versions: name and directory of each; the first is compared with the last.
        text: text to follow; None for the one that ships.
        threads: CPU threads of draft and target; 0 leaves the number to the libraries.

    Raises:
        InputError: the text cannot be read or is too short.
        TargetError: a version does not load, or its vocabulary differs from the draft's.
        BundleError, DraftError: the draft does not load.
    """
    if threads:
        torch.set_num_threads(threads)
    draft_bundle = read_bundle(bundle)
    vocabulary = draft_bundle.manifest.vocabulary.hash
    for name, path in versions:
        vocabularies = accepted_vocabularies(load_tokenizer(path, base_directory(path)))
        if vocabulary not in vocabularies:
            raise TargetError(
                f"{name} has the vocabulary {next(iter(vocabularies))}, but the draft in {bundle} has {vocabulary}: "
                "their token ids do not correspond, so acceptance cannot be measured"
            )
    draft = OnnxDraft(draft_bundle, threads)
    pieces = _cut_pieces(draft, text)
    passages = {
        temperature: [
            Passage(ids, PREFILL_TOKENS, Sampling(temperature=temperature, seed=index))
            for index, ids in enumerate(pieces)
        ]
        for temperature in TEMPERATURES
    }
    drafted = {
        temperature: [
            [proposal.tokens[0] for proposal in propose_tokens(draft.new_context(), passage)]
            for passage in passages[temperature]
        ]
        for temperature in TEMPERATURES
    }
    # By temperature: of each version the accepted positions of each passage.
    accepted: dict[float, list[list[int]]] = {temperature: [[] for _ in versions] for temperature in TEMPERATURES}
    for version, (_, path) in enumerate(versions):
        model, _, _ = load_model(path, device, dtype)
        # The logits do not depend on the temperature: one forward serves all of them.
        for index, logits in enumerate(judged_logits(model, passages[TEMPERATURES[0]])):
            for temperature in TEMPERATURES:
                passage = passages[temperature][index]
                chosen = choose_tokens(logits, [(passage.sampling, passage.positions)])
                accepted[temperature][version].append(count_accepted(drafted[temperature][index], chosen)[0])
        del model  # before the next one is loaded
    return AcceptanceForecast(
        draft=str(bundle),
        versions=[name for name, _ in versions],
        positions=JUDGED_TOKENS * len(pieces),
        passages=len(pieces),
        expectations=[_forecast_row(temperature, counts) for temperature, counts in accepted.items()],
    )


def _forecast_row(temperature: float, accepted: list[list[int]]) -> ForecastRow:
    """The row for accepted positions by version and passage."""
    bootstrap = Bootstrap(RESAMPLES, 0)

    def share(counts: Sequence[float]) -> Interval:
        interval = bootstrap.ratio([(count, JUDGED_TOKENS) for count in counts])
        assert interval is not None  # no passage is empty
        return interval

    change = [first - last for first, last in zip(accepted[0], accepted[-1], strict=True)]
    return ForecastRow(
        temperature=temperature,
        acceptance=[share(counts) for counts in accepted],
        change=share(change) if len(accepted) > 1 else None,
    )


def _cut_pieces(draft: OnnxDraft, text: Path | None) -> list[list[int]]:
    """Pieces of PREFILL_TOKENS + JUDGED_TOKENS ids, spread evenly over the text."""
    try:
        words = read_calibration_text() if text is None else text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read --text {text}: {error}") from None
    ids = draft.tokenizer.encode(words, add_special_tokens=False).ids
    length = PREFILL_TOKENS + JUDGED_TOKENS
    if length > draft.manifest.architecture.context:
        raise InputError(f"the draft's context is shorter than {length} tokens, so acceptance cannot be measured")
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if len(pieces) < MIN_PASSAGES:
        raise InputError(f"the text has {len(ids)} tokens: give a --text of at least {MIN_PASSAGES * length}")
    step = max(1.0, len(pieces) / MAX_PASSAGES)
    return [pieces[int(index * step)] for index in range(min(len(pieces), MAX_PASSAGES))]
