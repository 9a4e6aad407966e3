"""A profile says what a board is, in TOML: how fast it drafts, what it draws, and where each figure is from.

    name, title, origin     what it is called, and whether the figures are somebody else's or this board's own
    [processor]             cores, and how fast weights go through them
    [power]                 watts, idle and busy
    [radio.NAME]            joules per byte by wifi, ethernet, lte or 5g
    [sensors]               where this board's sensors are
    [[draft]]               measured speed of one draft with one number of threads
    [link], [calibration]   what else a calibration found, and under which circumstances

What was measured for a draft is used for that draft; anything else is modelled from [processor], and the methods of
`BoardProfile` say how. A table that is missing means that nobody knows, and what would need it is None. Loading this module
costs no more than msgspec: planners import it on the board.
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

# `derived`: computed from published figures of something else, as the sources say.
Origin = Literal["published", "derived", "measured"]


class ProfileTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all tables of a profile."""


class SourcedTable(ProfileTable, frozen=True):
    """A table whose figures come from somewhere.

    Attributes:
        origin: how the figures came about.
        sources: where from, in words.
    """

    origin: Origin
    sources: Sources


class ProcessorSpeed(SourcedTable, frozen=True):
    """How fast weights go through the processor.

    Attributes:
        model: the chip.
        cores: its CPU cores.
        weight_bytes_per_second: weights streamed by decoding: tokens per second times weight bytes.
        prefill_bytes_per_second: the same product for prefill, where many tokens share one reading of the weights and
            arithmetic is the limit. The unit hides the weights' type only roughly: for one chip, int8 and fp32 weights
            come out alike and int4 at about half, since a weight costs the same arithmetic in half the bytes.
    """

    model: Text
    cores: Count
    weight_bytes_per_second: Positive
    prefill_bytes_per_second: Positive


class BoardPower(SourcedTable, frozen=True):
    """What the whole board draws, idle and under full CPU load, without display and with no more than a keyboard."""

    idle_watts: Positive
    busy_watts: Positive

    def __post_init__(self) -> None:
        if self.busy_watts < self.idle_watts:
            raise ValueError(f"busy_watts {self.busy_watts} is below idle_watts {self.idle_watts}")


class RadioEnergy(SourcedTable, frozen=True):
    """What talking costs above idle: watts = active_watts + joules per byte * bytes per second, then a tail.

    Attributes:
        joules_per_byte_sent, joules_per_byte_received: for every byte on the link.
        active_watts: for as long as an exchange lasts, whatever it carries.
        tail_watts, tail_seconds: for as long as the radio stays awake afterwards; a new exchange ends the tail.
    """

    joules_per_byte_sent: NotNegative
    joules_per_byte_received: NotNegative
    active_watts: NotNegative = 0.0
    tail_watts: NotNegative = 0.0
    tail_seconds: NotNegative = 0.0


class RadioEnergies(ProfileTable, frozen=True):
    """What the board may talk by; `[radio.wifi]`, `[radio.ethernet]`, `[radio.lte]`, `[radio.5g]`."""

    wifi: RadioEnergy | None = None
    ethernet: RadioEnergy | None = None
    lte: RadioEnergy | None = None
    nr: RadioEnergy | None = msgspec.field(default=None, name="5g")

    def named(self, name: str) -> RadioEnergy | None:
        """The radio by its name in TOML; None if nothing is known of it."""
        return {"wifi": self.wifi, "ethernet": self.ethernet, "lte": self.lte, "5g": self.nr}.get(name)


class SensorHints(ProfileTable, frozen=True):
    """Where to look for this board's sensors; probes look everywhere else too.

    Attributes:
        hwmon: `name` of hwmon devices that report power, voltage and current, or temperature.
        power_supply: names below /sys/class/power_supply.
        thermal: `type` of thermal zones that tell the processor's temperature.
        powercap: names of RAPL domains.
        pmic: whether the firmware reads the power management chip (`vcgencmd pmic_read_adc`, Raspberry Pi 5).
    """

    hwmon: list[Text] = []
    power_supply: list[Text] = []
    thermal: list[Text] = []
    powercap: list[Text] = []
    pmic: bool = False


class MeasuredDraft(ProfileTable, frozen=True):
    """One draft with one number of threads, measured.

    Attributes:
        bundle: the bundle's name.
        sha256: see `draft_sha256`.
        weight_bytes: see `weight_bytes`.
        threads: CPU threads of a step.
        milliseconds: per drafted token, its choice included, by the tokens before it.
        prefill_tokens_per_second: of a long prompt.
        watts: what the whole board drew meanwhile; None without a sensor.
    """

    bundle: Text
    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    weight_bytes: Count
    threads: Count
    milliseconds: Annotated[dict[Count, Positive], msgspec.Meta(min_length=1)]
    prefill_tokens_per_second: Positive
    watts: Positive | None = None

    def seconds(self, context: int) -> float:
        """Per token: between two measured contexts on the line through them, outside them as at the nearest."""
        contexts = sorted(self.milliseconds)
        index = bisect_right(contexts, context)
        before, after = contexts[max(0, index - 1)], contexts[min(index, len(contexts) - 1)]
        low, high = self.milliseconds[before] / 1e3, self.milliseconds[after] / 1e3
        share = min(1.0, max(0.0, (context - before) / (after - before))) if before < after else 0.0
        return low + share * (high - low)


class MeasuredLink(ProfileTable, frozen=True):
    """The way to a verifier at the time of calibration.

    Attributes:
        verifier: its URL.
        request_seconds: median of a small request over one connection, the verifier's own work included.
        rtt_seconds: smoothed round-trip time of that connection, as the kernel measures it; None where it does not.
    """

    verifier: Text
    request_seconds: Positive
    rtt_seconds: NotNegative | None = None


class Calibration(ProfileTable, frozen=True):
    """Circumstances of a measurement.

    Attributes:
        date: when.
        seconds: how long it took.
        kernel: name and release.
        runtime: onnxruntime's version.
        one_thread_bytes_per_second, read_bytes_per_second: memory reading by one thread and by all cores.
        load: programs that wanted to run in the minute before, on average; above 0, they disturbed.
        governor: of CPU frequency; empty where the kernel has none.
    """

    date: datetime.date
    seconds: Positive
    kernel: Text
    runtime: Text
    one_thread_bytes_per_second: Positive
    read_bytes_per_second: Positive
    load: NotNegative = 0.0
    governor: str = ""


class BoardProfile(ProfileTable, frozen=True):
    """One board.

    Attributes:
        name: short name, that of its file.
        title: for people.
        origin: `published` (somebody else's figures) or `measured` (the board at hand); each table says it of itself.
    """

    name: Name
    title: Text
    origin: Literal["published", "measured"]
    processor: ProcessorSpeed
    power: BoardPower | None = None
    radio: RadioEnergies = RadioEnergies()
    sensors: SensorHints = SensorHints()
    draft: list[MeasuredDraft] = []
    link: MeasuredLink | None = None
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        keys = [(entry.sha256, entry.threads) for entry in self.draft]
        if len(set(keys)) < len(keys):
            raise ValueError("two [[draft]] tables are of the same bundle and number of threads")

    def measured(self, weight_bytes: int, context: int, threads: int = 0) -> MeasuredDraft | None:
        """The measurement that speaks for a draft: the fastest at `context`, of `threads` threads unless 0.

        A draft is told by its weight bytes. None means that the figures of this draft are modelled.
        """
        entries = [e for e in self.draft if e.weight_bytes == weight_bytes and threads in (0, e.threads)]
        return min(entries, key=lambda entry: entry.seconds(context), default=None)

    def draft_seconds(self, weight_bytes: int, context: int = 0, *, cache_bytes: int = 0, threads: int = 0) -> float:
        """Seconds per drafted token behind `context` tokens.

        Measured (`MeasuredDraft.seconds`) where this draft was; else modelled: a step reads every weight once and all
        keys and values so far, and memory is the limit (the roofline of Williams, Waterman and Patterson, 2009, at
        its bandwidth-bound end): (weight_bytes + context * cache_bytes) / weight_bytes_per_second.

        Args:
            weight_bytes: see the function of that name.
            cache_bytes: keys and values of one token in all layers; only the model uses it.
            threads: CPU threads of a step; 0 takes the fastest measured, and the model does not know threads.
        """
        entry = self.measured(weight_bytes, context, threads)
        if entry is not None:
            return entry.seconds(context)
        return (weight_bytes + context * cache_bytes) / self.processor.weight_bytes_per_second

    def prefill_seconds(self, weight_bytes: int, tokens: int, *, threads: int = 0) -> float:
        """Seconds to read `tokens` prompt tokens.

        At the measured rate where this draft was measured, else at tokens * weight_bytes / prefill_bytes_per_second
        (arithmetic is the limit, the roofline's other end); never less than one decoding step, which reads every
        weight as well.
        """
        if not tokens:
            return 0.0
        entry = self.measured(weight_bytes, 0, threads)
        if entry is not None:
            return max(tokens / entry.prefill_tokens_per_second, entry.seconds(0))
        modelled = tokens * weight_bytes / self.processor.prefill_bytes_per_second
        return max(modelled, self.draft_seconds(weight_bytes))

    def draft_joules(
        self, weight_bytes: int, context: int = 0, *, cache_bytes: int = 0, threads: int = 0
    ) -> float | None:
        """Joules per drafted token above idle; None where the profile has no [power].

        `draft_seconds` times watts above idle: those measured while this very draft ran, else busy_watts - idle_watts,
        which is all cores' draw and so too high for a draft of few threads. Joules above idle are what drafting adds;
        idling meanwhile costs `idle_joules` whatever one does.
        """
        if self.power is None:
            return None
        entry = self.measured(weight_bytes, context, threads)
        watts = entry.watts if entry is not None and entry.watts is not None else self.power.busy_watts
        seconds = self.draft_seconds(weight_bytes, context, cache_bytes=cache_bytes, threads=threads)
        return seconds * max(0.0, watts - self.power.idle_watts)

    def idle_joules(self, seconds: float) -> float | None:
        """Joules of merely being on; None where the profile has no [power]."""
        return None if self.power is None else seconds * self.power.idle_watts

    def transfer_joules(self, radio: str, sent: int, received: int, seconds: float) -> float | None:
        """Joules above idle of an exchange over `radio`; None where the profile knows nothing of that radio.

        active_watts * seconds + bytes * joules per byte, the linear throughput model of Huang et al. (MobiSys 2012).

        Args:
            sent, received: bytes on the link.
            seconds: from the first byte to the last, waiting included: the radio stays connected meanwhile.
        """
        figures = self.radio.named(radio)
        if figures is None:
            return None
        carried = sent * figures.joules_per_byte_sent + received * figures.joules_per_byte_received
        return carried + seconds * figures.active_watts

    def tail_joules(self, radio: str, seconds: float) -> float | None:
        """Joules above idle that `radio` draws in `seconds` of silence after an exchange; None as above."""
        figures = self.radio.named(radio)
        return None if figures is None else figures.tail_watts * min(seconds, figures.tail_seconds)


class ProfileError(InputError):
    """A profile that does not exist or does not parse, or a calibration that cannot be made; says what to do."""


def weight_bytes(manifest: Manifest) -> int:
    """The size by which profiles know a draft: all files of its bundle but the tokenizer."""
    return sum(record.bytes for name, record in manifest.files.items() if name != "tokenizer.json")


def cache_bytes(manifest: Manifest) -> int:
    """Keys and values of one token in all layers of a draft, in float32 as the runner holds them."""
    shape = manifest.architecture
    return 2 * 4 * shape.layers * shape.kv_heads * shape.head_dim


def draft_sha256(manifest: Manifest) -> str:
    """Tells one export of a draft from another: the hash of the hashes of all files but the tokenizer."""
    records = sorted((name, record.sha256) for name, record in manifest.files.items() if name != "tokenizer.json")
    return hashlib.sha256("".join(f"{sha256}  {name}\n" for name, sha256 in records).encode()).hexdigest()


def read_profile(path: Path) -> BoardProfile:
    """The profile in the TOML file at `path`. Raises ProfileError, naming the file, the field or line, and the cure."""
    try:
        profile = msgspec.toml.decode(path.read_bytes(), type=BoardProfile)
    except OSError as error:
        raise ProfileError(
            f"cannot read the profile {path}: {error.strerror}; `device-profile list` names those that are shipped"
        ) from None
    except msgspec.ValidationError as error:
        raise ProfileError(f"{path} is not a profile: {_located(str(error))}") from None
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
        raise ProfileError(f"{path} is not TOML: {error}; correct it there") from None
    if profile.name != path.stem:
        raise ProfileError(
            f"{path} calls itself {profile.name!r}; name and file name must be the same: change `name`, or rename it"
        )
    return profile


def shipped_profiles() -> list[BoardProfile]:
    """The profiles that come with FlexSpec, by name."""
    return [read_profile(path) for path in sorted(BOARDS_DIRECTORY.glob("*.toml"))]


def find_profile(name: str) -> BoardProfile:
    """A shipped profile by its name, or the one in a .toml file. Raises ProfileError."""
    if name.endswith(".toml"):
        return read_profile(Path(name))
    shipped = {profile.name: profile for profile in shipped_profiles()}
    if name in shipped:
        return shipped[name]
    raise ProfileError(f"no shipped profile {name!r}: there are {', '.join(shipped)}; or give a .toml file")


def _located(message: str) -> str:
    """msgspec's message, with the field first and as TOML people write it."""
    what, _, path = message.partition(" - at `$")
    field = re.sub(r"^\.", "", path.rstrip("`"))
    missing = re.match(r"Object missing required field `(\w+)`", what)
    unknown = re.match(r"Object contains unknown field `(.*)`", what, re.DOTALL)
    if missing:
        return f"{_join(field, missing[1])} is missing: add it"
    if unknown:
        return f"{_join(field, unknown[1])} is not a field of profiles: remove it, or correct its spelling"
    return f"{field or 'as a whole'}: {what}; correct it"


def _join(table: str, field: str) -> str:
    return f"{table}.{field}" if table else field
