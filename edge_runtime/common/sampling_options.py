"""The sampling parameters on command lines: `edge-runtime generate` and `chat`, and `cloud-verifier generate`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_runtime.common.options import ArgumentContainer, add_flag, add_option
from edge_runtime.protocol.errors import InputError

# Imported by every command; it is slow to import.
if TYPE_CHECKING:
    from edge_runtime.protocol.sampling import Sampling


class SamplingOption(NamedTuple):
    """An option for the field of `Sampling` with the same name.

    Attributes:
        help: what the value does.
    """

    option: str
    default: float
    help: str


SAMPLING_OPTIONS = (
    SamplingOption("--temperature T", 0.0, "divides the logits; 0 is greedy decoding"),
    SamplingOption("--top-k K", 0, "sample from the K most probable tokens; 0 keeps all"),
    SamplingOption(
        "--top-p P", 1.0, "sample from the most probable tokens that together reach this probability; 1 keeps all"
    ),
    SamplingOption(
        "--min-p P", 0.0, "sample from tokens with at least this share of the best one's probability; 0 keeps all"
    ),
    SamplingOption(
        "--repetition-penalty P", 1.0, "divides the logits of tokens that occur in prompt or text; 1 changes nothing"
    ),
    SamplingOption(
        "--presence-penalty P", 0.0, "subtracted from the logits of tokens that were generated; 0 changes nothing"
    ),
    SamplingOption(
        "--frequency-penalty P", 0.0, "the same, once for each time that a token was generated; 0 changes nothing"
    ),
    SamplingOption("--min-tokens N", 0, "tokens that the text has at least"),
)


def add_sampling_options(parser: ArgumentContainer, *, of_model: bool = False) -> None:
    """Add an option for every sampling parameter.

    Args:
        of_model: an option that is not given is None, for which the model's own default stands.
    """
    for option, default, text in SAMPLING_OPTIONS:
        # `Sampling` checks the ranges.
        if of_model:
            add_option(parser, option, f"{text} (default: the model's, else {default:g})", type=type(default))
        else:
            add_option(parser, option, text, default=default, type=type(default))
    for repeated, parse, text in (
        ("--logit-bias ID=BIAS", _parse_bias, "add BIAS to the logit of this token id; may be repeated"),
        ("--stop-id ID", int, "also end the text at this token id; may be repeated"),
    ):
        add_option(parser, repeated, text, type=parse, action="append")
    add_option(parser, "--seed", "same input and same seed give the same text", default=0, type=int)
    add_flag(parser, "--ignore-eos", "continue after the end-of-text token, for measurements")


def read_sampling(options: argparse.Namespace, *, grammar: str = "", **defaults: float | None) -> Sampling:
    """Return the parameters of `add_sampling_options`.

    Args:
        grammar: see `Sampling`.
        defaults: of the model, for options that were not given.

    Raises:
        InputError: a parameter is out of range.
    """
    from edge_runtime.protocol.sampling import Sampling

    names = [option.partition(" ")[0].strip("-").replace("-", "_") for option, _, _ in SAMPLING_OPTIONS]
    given: Mapping[str, Any] = {name: getattr(options, name) for name in names}
    chosen = defaults | {name: value for name, value in given.items() if value is not None}
    try:
        return Sampling(
            **{name: value for name, value in chosen.items() if value is not None},
            seed=options.seed,
            ignore_eos=options.ignore_eos,
            logit_bias=dict(options.logit_bias or []),
            stop_ids=options.stop_id or [],
            grammar=grammar,
        )
    except ValueError as error:
        raise InputError(str(error)) from None


def _parse_bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=BIAS, such as 198=-100") from None
