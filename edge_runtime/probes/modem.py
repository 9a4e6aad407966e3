"""A mobile-network modem, through ModemManager's own program.

`mmcli` rather than D-Bus: its JSON is the same information, once a minute it costs little, and a D-Bus library would be
one more dependency of every board for the few with a modem.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from edge_runtime.probes.roots import ProbeError, Reader, decimal, shown

T = TypeVar("T")

# What mmcli says instead of null.
UNKNOWN = "--"


class Radio(msgspec.Struct, frozen=True):
    """Signal of the technology in use; None where the modem does not say.

    ModemManager measures only after `mmcli -m any --signal-setup=60`; a probe changes no setting, so that is the
    owner's to do.
    """

    technology: str
    rssi_dbm: float | None = None
    rsrp_dbm: float | None = None
    rsrq_db: float | None = None
    sinr_db: float | None = None


class Modem(msgspec.Struct, frozen=True):
    """The first modem.

    Attributes:
        state: such as `connected`, `registered`, `searching`, `failed`.
        technologies: in use, such as `lte`, `5gnr`.
        quality_percent: the modem's own summary of its signal.
        roaming: whether it is in somebody else's network.
        radio: signal in detail.
    """

    state: str
    technologies: list[str]
    quality_percent: float | None
    roaming: bool | None
    radio: Radio | None = None


class _Quality(msgspec.Struct, frozen=True):
    value: str = UNKNOWN


class _Generic(msgspec.Struct, rename="kebab"):
    state: str = UNKNOWN
    access_technologies: list[str] | str = []
    signal_quality: _Quality = _Quality()


class _Network(msgspec.Struct, rename="kebab"):
    registration_state: str = UNKNOWN


class _Modem(msgspec.Struct):
    generic: _Generic
    network: _Network = msgspec.field(name="3gpp", default_factory=_Network)


class _ModemAnswer(msgspec.Struct):
    modem: _Modem


class _Values(msgspec.Struct):
    rssi: str = UNKNOWN
    rsrp: str = UNKNOWN
    rsrq: str = UNKNOWN
    snr: str = UNKNOWN


class _Signal(msgspec.Struct):
    nr: _Values = msgspec.field(name="5g", default_factory=_Values)
    lte: _Values = msgspec.field(default_factory=_Values)
    umts: _Values = msgspec.field(default_factory=_Values)
    gsm: _Values = msgspec.field(default_factory=_Values)


class _SignalModem(msgspec.Struct):
    signal: _Signal


class _SignalAnswer(msgspec.Struct):
    modem: _SignalModem


def parse_modem(text: str) -> Modem:
    """`mmcli -m any -J`. Raises ProbeError."""
    answer = _decoded(text, _ModemAnswer).modem
    technologies = answer.generic.access_technologies
    registration = answer.network.registration_state
    return Modem(
        answer.generic.state,
        [] if isinstance(technologies, str) else technologies,
        _number(answer.generic.signal_quality.value),
        None if registration == UNKNOWN else registration.startswith("roaming"),
    )


def parse_signal(text: str) -> Radio | None:
    """`mmcli -m any --signal-get -J`; None if the modem measures nothing. Raises ProbeError."""
    signal = _decoded(text, _SignalAnswer).modem.signal
    # A phone network of two generations at once (5G anchored on LTE) is as good as its newer half.
    for technology, values in (("5g", signal.nr), ("lte", signal.lte), ("umts", signal.umts), ("gsm", signal.gsm)):
        radio = Radio(technology, _number(values.rssi), _number(values.rsrp), _number(values.rsrq), _number(values.snr))
        if radio != Radio(technology):
            return radio
    return None


def read_modem(reader: Reader) -> Modem | None:
    """Runs `mmcli` if the kernel has a modem's devices; None if not, or ModemManager knows of none."""
    devices = [
        name
        for directory, prefix in (("wwan", ""), ("usbmisc", "cdc-wdm"), ("net", "wwan"), ("net", "ppp"))
        for name in reader.names(f"{reader.sysfs}/class/{directory}", prefix)
    ]
    if not devices:
        return None
    modem = reader.program(parse_modem, "mmcli", "-m", "any", "-J")
    if modem is None:
        return None
    radio = reader.program(parse_signal, "mmcli", "-m", "any", "--signal-get", "-J")
    return msgspec.structs.replace(modem, radio=radio)


def _decoded(text: str, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise ProbeError(f"not what mmcli prints: {shown(text)}") from None


def _number(text: str) -> float | None:
    return None if text == UNKNOWN else decimal(text)
