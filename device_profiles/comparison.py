"""Cost of a draft on boards, and tables that compare them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from rich.table import Table

from edge_runtime.planning.board_profile import (
    BoardProfile,
    ProcessorSpeed,
    ProfileError,
    RadioEnergy,
    cache_bytes,
    weight_bytes,
)
from edge_runtime.protocol.bundle import read_bundle

Basis = Literal["measured", "modeled"]


class DraftSize(msgspec.Struct, frozen=True):
    """The sizes of a draft from which its cost is modeled; see `BoardProfile.draft_seconds`."""

    name: str
    weight_bytes: int
    cache_bytes: int = 0

    @classmethod
    def from_bundle(cls, path: Path) -> DraftSize:
        """Sizes from a bundle's manifest. Raises BundleError."""
        manifest = read_bundle(path, verify=False).manifest
        return cls(manifest.name, weight_bytes(manifest), cache_bytes(manifest))

    @classmethod
    def from_weight_file(cls, path: Path) -> DraftSize:
        """Size from a weight file. Raises ProfileError."""
        try:
            return cls(path.name, path.stat().st_size)
        except OSError as error:
            raise ProfileError(f"cannot read {path}: {error.strerror}; give the draft's weight file") from None


class DraftCost(msgspec.Struct, frozen=True):
    """Cost of drafting on one board. Joules are above idle; None if the profile has no [power].

    Attributes:
        basis, joules_basis: `measured` if the profile has measurements of this draft.
    """

    context: int
    milliseconds_per_token: float
    tokens_per_second: float
    prefill_tokens_per_second: float
    basis: Basis
    joules_per_token: float | None
    joules_basis: Basis

    @classmethod
    def estimate(cls, profile: BoardProfile, draft: DraftSize, context: int) -> DraftCost:
        entry = profile.find_measurement(draft.weight_bytes, context)
        seconds = profile.draft_seconds(draft.weight_bytes, context, draft.cache_bytes)
        prompt = max(1, context)
        return cls(
            context=context,
            milliseconds_per_token=1e3 * seconds,
            tokens_per_second=1 / seconds,
            prefill_tokens_per_second=prompt / profile.prefill_seconds(draft.weight_bytes, prompt),
            basis="modeled" if entry is None else "measured",
            joules_per_token=profile.draft_joules(draft.weight_bytes, context, draft.cache_bytes),
            joules_basis="modeled" if entry is None or entry.watts is None else "measured",
        )


def comparison_table(profiles: Sequence[BoardProfile], draft: DraftSize | None, context: int) -> Table:
    """Table of the profiles side by side, each figure with its origin."""
    table = Table("", *(profile.name for profile in profiles), title_justify="left", title=_title(draft, context))
    for label, figure in _figures():
        table.add_row(label, *(figure(profile) for profile in profiles))
    if draft is not None:
        table.add_section()
        costs = [DraftCost.estimate(profile, draft, context) for profile in profiles]
        table.add_row("ms per token", *(f"{cost.milliseconds_per_token:.3g} {cost.basis}" for cost in costs))
        table.add_row("tokens/s", *(f"{cost.tokens_per_second:.0f} {cost.basis}" for cost in costs))
        table.add_row("prefill tokens/s", *(f"{cost.prefill_tokens_per_second:.0f} {cost.basis}" for cost in costs))
        table.add_row("J per token above idle", *map(_joules, costs))
    return table


def describe_profile(profile: BoardProfile) -> Iterator[str]:
    """The profile as lines of text: every figure, with the sources of each section."""
    yield f"{profile.name}: {profile.title} ({profile.origin})"
    facts = msgspec.to_builtins(profile)
    sustained = facts.get("calibration", {}).pop("sustained", [])
    tables = [(name, facts[name]) for name in ("processor", "power", "sensors") if name in facts]
    tables += [(f"radio.{name}", radio) for name, radio in facts.get("radio", {}).items()]
    tables += [("draft", speed) for speed in facts.get("draft", [])]
    tables += [(name, facts[name]) for name in ("calibration",) if name in facts]
    for name, table in tables:
        origin = table.pop("origin", "")
        sources = table.pop("sources", [])
        yield ""
        yield f"{name}  ({origin})" if origin else name
        for field, value in table.items():
            yield f"  {field:28} {_plain(value)}"
        for source in sources:
            yield f"  source: {source}"
    if sustained:
        yield ""
        yield "drafting without a pause"
    for sample in sustained:
        yield f"  {', '.join(f'{field} {_plain(value)}' for field, value in sample.items())}"


def _title(draft: DraftSize | None, context: int) -> str | None:
    return f"{draft.name}, {draft.weight_bytes / 1e6:.3g} MB, after {context} tokens" if draft else None


def _figures() -> Iterator[tuple[str, Callable[[BoardProfile], str]]]:
    def processor(figure: Callable[[ProcessorSpeed], str]) -> Callable[[BoardProfile], str]:
        return lambda profile: f"{figure(profile.processor)} {profile.processor.origin}"

    def power(field: str) -> Callable[[BoardProfile], str]:
        return lambda p: "-" if p.power is None else f"{getattr(p.power, field):.3g} {p.power.origin}"

    def radio(name: str, figure: Callable[[RadioEnergy], str]) -> Callable[[BoardProfile], str]:
        def text(profile: BoardProfile) -> str:
            known = profile.radio.by_name(name)
            return "-" if known is None else f"{figure(known)} {known.origin}"

        return text

    yield "origin", lambda profile: profile.origin
    yield "cores", lambda profile: str(profile.processor.cores)
    yield "decoding, weights GB/s", processor(lambda p: f"{p.weight_bytes_per_second / 1e9:.3g}")
    yield "prefill, weights GB/s", processor(lambda p: f"{p.prefill_bytes_per_second / 1e9:.3g}")
    yield "idle W", power("idle_watts")
    yield "busy W", power("busy_watts")
    for name in ("wifi", "ethernet", "lte", "5g"):
        yield (
            f"{name} J/MB up, down",
            radio(name, lambda r: f"{1e6 * r.joules_per_byte_sent:.2g}, {1e6 * r.joules_per_byte_received:.2g}"),
        )
        yield (
            f"{name} active W, tail J",
            radio(name, lambda r: f"{r.active_watts:.3g}, {r.tail_watts * r.tail_seconds:.3g}"),
        )


def _joules(cost: DraftCost) -> str:
    return "-" if cost.joules_per_token is None else f"{cost.joules_per_token:.3g} {cost.joules_basis}"


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {figure}" for key, figure in value.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)
