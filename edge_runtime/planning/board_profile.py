"""Board profiles: the data model and reader of TOML files with a board's speed, power draw and sensors.

    name, title, origin     identity of the board, and whether its figures are published or were measured on it
    [processor]             cores, and weight bytes per second in decode and prefill
    [power]                 watts, idle and busy
    [radio.NAME]            joules per byte over wifi, ethernet, lte or 5g
    [sensors.lines]         what the board's current sensors measure
    [[draft]]               measured speed of one draft with one number of threads
    [calibration]           circumstances of a calibration, and the board under sustained load

Measurements of a draft are used for that draft; all other figures are modeled from [processor] by the methods of
`BoardProfile`. A missing table means that nothing is known, and results that depend on it are None. Importing this
module costs no more than importing msgspec, because planners import it on the board.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from bisect import bisect_right
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from edge_runtime.protocol.errors import InputError

if TYPE_CHECKING:
    from edge_runtime.protocol.bundle import Manifest

BOARDS_DIRECTORY = Path(__file__).parents[2] / "device_profiles" / "boards"

Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e18)]
NotNegative = Annotated[float, msgspec.Meta(ge=0, lt=1e18)]
Count = Annotated[int, msgspec.Meta(gt=0, lt=1 << 50)]
Text = Annotated[str, msgspec.Meta(min_length=1)]
Sources = Annotated[list[Text], msgspec.Meta(min_length=1)]
Name = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9][a-z0-9._-]*\Z")]

# Length of text, in tokens, at which numbers of threads are compared and speeds are told. Chosen: a chat's second turn.
TYPICAL_CONTEXT = 512
# When measurements are steady: at least so many, and at most this relative spread. Chosen: an idle machine stays below.
MIN_STEADY_PASSES = 3
MAX_STEADY_SPREAD = 0.15
# What a current sensor measures; see `SensorHints`.
SensorLine = Literal["board", "charger", "battery", "battery-reversed"]
# `derived`: computed from published figures of other hardware, as the sources state.
Origin = Literal["published", "derived", "measured"]


class ProfileTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base class of all tables of a profile."""


class SourcedTable(ProfileTable, frozen=True):
    """A table that states where its figures come from.

    Attributes:
        origin: how the figures were obtained.
        sources: citations or descriptions, as text.
    """

    origin: Origin
    sources: Sources


class ProcessorSpeed(SourcedTable, frozen=True):
    """Throughput of draft weights on the processor.

    Attributes:
        model: the chip.
        cores: number of CPU cores.
        weight_bytes_per_second: weight bytes streamed in decode: tokens per second times weight bytes.
        prefill_bytes_per_second: the same product for prefill, in which many tokens share one read of the weights and
            arithmetic is the limit. The unit abstracts from the weights' type only roughly: on one chip, int8 and fp32
            weights come out alike and int4 at about half, because a weight costs the same arithmetic in half the bytes.
    """

    model: Text
    cores: Count
    weight_bytes_per_second: Positive
    prefill_bytes_per_second: Positive


class BoardPower(SourcedTable, frozen=True):
    """Power draw of the whole board, idle and under full CPU load, without a display and with at most a keyboard."""

    idle_watts: Positive
    busy_watts: Positive

    def __post_init__(self) -> None:
        if self.busy_watts < self.idle_watts:
            raise ValueError(f"busy_watts {self.busy_watts} is below idle_watts {self.idle_watts}")


class RadioEnergy(SourcedTable, frozen=True):
    """Energy of transfers above idle: watts = active_watts + joules per byte * bytes per second, followed by a tail.

    Attributes:
        joules_per_byte_sent, joules_per_byte_received: for every byte on the link.
        active_watts: for the duration of an exchange, whatever it carries.
        tail_watts, tail_seconds: while the radio stays awake afterwards; a new exchange ends the tail.
    """

    joules_per_byte_sent: NotNegative
    joules_per_byte_received: NotNegative
    active_watts: NotNegative = 0.0
    tail_watts: NotNegative = 0.0
    tail_seconds: NotNegative = 0.0


class RadioEnergies(ProfileTable, frozen=True):
    """The radios of a board: `[radio.wifi]`, `[radio.ethernet]`, `[radio.lte]`, `[radio.5g]`."""

    wifi: RadioEnergy | None = None
    ethernet: RadioEnergy | None = None
    lte: RadioEnergy | None = None
    nr: RadioEnergy | None = msgspec.field(default=None, name="5g")

    def by_name(self, name: str) -> RadioEnergy | None:
        """Return a radio by its name in TOML; None if the profile does not contain it."""
        return {"wifi": self.wifi, "ethernet": self.ethernet, "lte": self.lte, "5g": self.nr}.get(name)


class SensorHints(ProfileTable, frozen=True):
    """What the board's current sensors measure, where neither their labels nor their readings say it.

    Attributes:
        lines: by chip such as `ina219`, or by chip and label such as `ina3221 VBAT`: `board` (all that the board
            draws), `charger` (board and battery), `battery` (a positive current charges it) or `battery-reversed`
            (a positive current discharges it).
    """

    lines: dict[Text, SensorLine] = {}


class MeasuredDraft(ProfileTable, frozen=True):
    """Measured speed of one draft with one number of threads.

    Attributes:
        bundle: name of the bundle.
        sha256: see `draft_sha256`.
        weight_bytes: see `weight_bytes`.
        threads: CPU threads of a step.
        milliseconds: time per draft token, sampling included, by context length in tokens.
        prefill_tokens_per_second: of a long prompt.
        watts: power draw of the whole board meanwhile; None without a sensor.
        passes: number of measurements, spread over the calibration, of which each figure is the median.
        spread: of a time over these, at the context where it is largest: maximum minus minimum, relative to the median.
    """

    bundle: Text
    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    weight_bytes: Count
    threads: Count
    milliseconds: Annotated[dict[Count, Positive], msgspec.Meta(min_length=1)]
    prefill_tokens_per_second: Positive
    watts: Positive | None = None
    passes: Count = 1
    spread: NotNegative = 0.0

    @property
    def is_steady(self) -> bool:
        """Whether repeated measurements agreed, so that the figures describe the board and not its other programs."""
        return self.passes >= MIN_STEADY_PASSES and self.spread <= MAX_STEADY_SPREAD

    def seconds(self, context: int) -> float:
        """Return the time per token: linear between two measured contexts, constant outside of them."""
        contexts = sorted(self.milliseconds)
        index = bisect_right(contexts, context)
        before, after = contexts[max(0, index - 1)], contexts[min(index, len(contexts) - 1)]
        low, high = self.milliseconds[before] / 1e3, self.milliseconds[after] / 1e3
        share = min(1.0, max(0.0, (context - before) / (after - before))) if before < after else 0.0
        return low + share * (high - low)


class SustainedSample(ProfileTable, frozen=True):
    """The board after some time of drafting without a pause.

    Attributes:
        seconds: since the beginning.
        milliseconds: time per draft token since the last sample.
        celsius: temperature of the processor; None without a sensor.
        hertz: present clock; None if the kernel does not report it.
        throttled: why the processor was throttled; empty if it was not, or if nothing says.
    """

    seconds: NotNegative
    milliseconds: Positive
    celsius: float | None = None
    hertz: Positive | None = None
    throttled: list[Text] = []


class Calibration(ProfileTable, frozen=True):
    """Circumstances of a calibration.

    Attributes:
        seconds: duration.
        kernel: name and release.
        runtime: version of onnxruntime.
        sustained: the board while it drafts without a pause, with the fastest number of threads.
        load: one-minute load average before the start; above 0, other programs disturbed the measurement.
        governor: CPU frequency governor; empty if the kernel has none.
    """

    date: datetime.date
    seconds: Positive
    kernel: Text
    runtime: Text
    sustained: list[SustainedSample] = []
    load: NotNegative = 0.0
    governor: str = ""


class BoardProfile(ProfileTable, frozen=True):
    """The profile of one board.

    Attributes:
        name: short name, equal to the file name without its suffix.
        title: display name.
        origin: `published` (figures from elsewhere) or `measured` (on the board at hand); each table also has its own.
        device_tree: how the models of such boards begin in their device tree; empty for a PC, which has none.
    """

    name: Name
    title: Text
    origin: Literal["published", "measured"]
    processor: ProcessorSpeed
    power: BoardPower | None = None
    radio: RadioEnergies = RadioEnergies()
    sensors: SensorHints = SensorHints()
    draft: list[MeasuredDraft] = []
    calibration: Calibration | None = None
    device_tree: list[Text] = []

    def __post_init__(self) -> None:
        keys = [(entry.sha256, entry.threads) for entry in self.draft]
        if len(set(keys)) < len(keys):
            raise ValueError("two [[draft]] tables have the same bundle and number of threads")

    def find_measurement(self, weight_bytes: int, context: int = TYPICAL_CONTEXT) -> MeasuredDraft | None:
        """Return the measurement, over numbers of threads, of a draft that is fastest at `context`; None without any.

        Args:
            weight_bytes: identifies the draft.
            context: length in tokens.
        """
        entries = [entry for entry in self.draft if entry.weight_bytes == weight_bytes]
        return min(entries, key=lambda entry: entry.seconds(context), default=None)

    def steady_measurement(self, manifest: Manifest) -> MeasuredDraft | None:
        """Return the fastest measurement of exactly this draft; None without any, or if it is unsteady."""
        entry = self.find_measurement(weight_bytes(manifest))
        return entry if entry is not None and entry.sha256 == draft_sha256(manifest) and entry.is_steady else None

    def is_evidently_other(self, model: str) -> bool:
        """Return whether a machine cannot be this board.

        Args:
            model: of the machine, from its device tree; empty without one.
        """
        if not self.device_tree:
            return bool(model)
        return not model.startswith(tuple(self.device_tree))

    def draft_seconds(self, weight_bytes: int, context: int = 0, cache_bytes: int = 0) -> float:
        """Return the seconds per draft token after `context` tokens.

        Measured if this draft was (`MeasuredDraft.seconds`), else modeled: a step reads all weights and the KV cache
        once, and memory bandwidth is the limit (the roofline of Williams, Waterman and Patterson, 2009, at its
        bandwidth-bound end): (weight_bytes + context * cache_bytes) / weight_bytes_per_second.

        Args:
            weight_bytes: see the function of that name.
            context: length in tokens.
            cache_bytes: KV cache bytes of one token in all layers; used only by the model.
        """
        entry = self.find_measurement(weight_bytes, context)
        if entry is not None:
            return entry.seconds(context)
        return (weight_bytes + context * cache_bytes) / self.processor.weight_bytes_per_second

    def prefill_seconds(self, weight_bytes: int, tokens: int) -> float:
        """Return the seconds to prefill `tokens` prompt tokens.

        At the measured rate if this draft was measured, else tokens * weight_bytes / prefill_bytes_per_second
        (arithmetic is the limit, the other end of the roofline); at least one decode step, which reads all weights.
        """
        if not tokens:
            return 0.0
        entry = self.find_measurement(weight_bytes, 0)
        if entry is not None:
            return max(tokens / entry.prefill_tokens_per_second, entry.seconds(0))
        modeled = tokens * weight_bytes / self.processor.prefill_bytes_per_second
        return max(modeled, self.draft_seconds(weight_bytes))

    def draft_joules(self, weight_bytes: int, context: int = 0, cache_bytes: int = 0) -> float | None:
        """Return the joules per draft token above idle; None without [power].

        `draft_seconds` times the watts above idle: those measured while this draft ran, else busy_watts - idle_watts,
        which is the draw of all cores and therefore too high for a draft with few threads. Joules above idle are the
        cost of drafting; the idle draw meanwhile is spent in any case.
        """
        if self.power is None:
            return None
        entry = self.find_measurement(weight_bytes, context)
        watts = entry.watts if entry is not None and entry.watts is not None else self.power.busy_watts
        seconds = self.draft_seconds(weight_bytes, context, cache_bytes)
        return seconds * max(0.0, watts - self.power.idle_watts)

    def transfer_joules(self, radio: str, sent: int, received: int, seconds: float) -> float | None:
        """Return the joules above idle of an exchange over `radio`; None if the profile does not contain that radio.

        active_watts * seconds + bytes * joules per byte, the linear throughput model of Huang et al. (MobiSys 2012).

        Args:
            radio: its name in TOML.
            sent, received: bytes on the link.
            seconds: from the first byte to the last, waiting included, because the radio stays connected meanwhile.
        """
        figures = self.radio.by_name(radio)
        if figures is None:
            return None
        carried = sent * figures.joules_per_byte_sent + received * figures.joules_per_byte_received
        return carried + seconds * figures.active_watts


class ProfileError(InputError):
    """A profile does not exist or is invalid, or a calibration is impossible; the message states the remedy."""


def weight_bytes(manifest: Manifest) -> int:
    """Return the size by which profiles identify a draft: all files of its bundle except the tokenizer."""
    return sum(record.bytes for name, record in manifest.files.items() if name != "tokenizer.json")


def cache_bytes(manifest: Manifest) -> int:
    """Return the KV cache bytes of one token in all layers of a draft, in float32 as in the runner."""
    shape = manifest.architecture
    return 2 * 4 * shape.layers * shape.kv_heads * shape.head_dim


def draft_sha256(manifest: Manifest) -> str:
    """Return the identity of an exported draft: the hash of the hashes of all files except the tokenizer."""
    records = sorted((name, record.sha256) for name, record in manifest.files.items() if name != "tokenizer.json")
    return hashlib.sha256("".join(f"{sha256}  {name}\n" for name, sha256 in records).encode()).hexdigest()


def read_profile(path: Path) -> BoardProfile:
    """Read a profile from a TOML file.

    Raises:
        ProfileError: it cannot be read or is invalid; the message names the file, the field or line, and the remedy.
    """
    try:
        profile = msgspec.toml.decode(path.read_bytes(), type=BoardProfile)
    except OSError as error:
        raise ProfileError(
            f"cannot read the profile {path}: {error.strerror}; `device-profile list` lists the shipped profiles"
        ) from None
    except msgspec.ValidationError as error:
        raise ProfileError(f"{path} is not a valid profile: {_format_error(str(error))}") from None
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise ProfileError(f"{path} is not valid TOML: {error}; correct it there") from None
    if profile.name != path.stem:
        raise ProfileError(
            f"the name {profile.name!r} in {path} differs from the file name: change `name`, or rename the file"
        )
    return profile


def shipped_profiles() -> list[BoardProfile]:
    """Return the profiles shipped with FlexSpec, ordered by name."""
    return [read_profile(path) for path in sorted(BOARDS_DIRECTORY.glob("*.toml"))]


def find_profile(name: str) -> BoardProfile:
    """Return a shipped profile by its name, or read the profile at a path that ends in `.toml`.

    Raises:
        ProfileError: as `read_profile`, or there is no shipped profile of this name.
    """
    if name.endswith(".toml"):
        return read_profile(Path(name))
    shipped = {profile.name: profile for profile in shipped_profiles()}
    if name in shipped:
        return shipped[name]
    raise ProfileError(f"no shipped profile {name!r}: there are {', '.join(shipped)}; or give a .toml file")


def _format_error(message: str) -> str:
    """Return msgspec's message with the field first, in TOML notation."""
    what, _, path = message.partition(" - at `$")
    field = re.sub(r"^\.", "", path.rstrip("`"))
    missing = re.match(r"Object missing required field `(\w+)`", what)
    unknown = re.match(r"Object contains unknown field `(.*)`", what, re.DOTALL)
    if missing:
        return f"{_join(field, missing[1])} is missing: add it"
    if unknown:
        return f"{_join(field, unknown[1])} is not a field of a profile: remove it, or correct its spelling"
    return f"{field or 'top level'}: {what}; correct it"


def _join(table: str, field: str) -> str:
    return f"{table}.{field}" if table else field
