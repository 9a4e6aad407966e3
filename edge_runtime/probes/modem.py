"""Mobile-network modem, through ModemManager's `mmcli`.

`mmcli` instead of D-Bus: its JSON has the same information, it costs little once a minute, and a D-Bus library would be
a dependency of every board for the few that have a modem.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

from edge_runtime.probes.reader import ProbeError, Reader, decimal, excerpt, within

T = TypeVar("T")

# How mmcli prints null.
UNKNOWN = "--"
# What a modem can report, by 3GPP: RSSI in dBm as AT+CSQ (TS 27.007) and a margin, RSRP in dBm, RSRQ and SINR in dB as
# the reports of TS 38.133, whose ranges include those of LTE. Modems report an absent 5G value as -32768 or -3276.8.
RSSI_RANGE = (-120.0, -20.0)
RSRP_RANGE = (-156.0, -31.0)
RSRQ_RANGE = (-43.0, 20.0)
SINR_RANGE = (-23.0, 40.0)
MODEM_COMMAND = ("mmcli", "-m", "any", "-J")
SIGNAL_COMMAND = ("mmcli", "-m", "any", "--signal-get", "-J")


class ModemSignal(msgspec.Struct, frozen=True):
    """Signal of the radio technology in use; None for what the modem does not report.

    ModemManager measures only after `mmcli -m any --signal-setup=60`. A probe changes no settings, so the owner has to
    run it.
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
        technologies: access technologies in use, such as `lte`, `5gnr`.
        quality_percent: signal quality as reported by the modem.
        roaming: whether it is registered in a foreign network.
        radio: signal details.
    """

    state: str
    technologies: list[str]
    quality_percent: float | None
    roaming: bool | None
    radio: ModemSignal | None = None


class _Answer(msgspec.Struct, Generic[T]):
    modem: T


class _Generic(msgspec.Struct, rename="kebab"):
    state: str = UNKNOWN
    access_technologies: list[str] | str = []
    signal_quality: dict[str, str] = {}


class _Network(msgspec.Struct, rename="kebab"):
    registration_state: str = UNKNOWN


class _State(msgspec.Struct):
    generic: _Generic
    network: _Network = msgspec.field(name="3gpp", default_factory=_Network)


class _Values(msgspec.Struct):
    rssi: str = UNKNOWN
    rsrp: str = UNKNOWN
    rsrq: str = UNKNOWN
    snr: str = UNKNOWN


class _Signal(msgspec.Struct):
    signal: dict[str, _Values]


def parse_modem(text: str) -> Modem:
    """Parse `mmcli -m any -J`. Raises ProbeError."""
    answer = _decoded(text, _Answer[_State]).modem
    technologies = answer.generic.access_technologies
    registration = answer.network.registration_state
    return Modem(
        answer.generic.state,
        [] if isinstance(technologies, str) else technologies,
        _number(answer.generic.signal_quality.get("value", UNKNOWN), 0.0, 100.0),
        None if registration == UNKNOWN else registration.startswith("roaming"),
    )


def parse_signal(text: str) -> ModemSignal | None:
    """Parse `mmcli -m any --signal-get -J`; None if the modem reports no values. Raises ProbeError."""
    signal = _decoded(text, _Answer[_Signal]).modem.signal
    # With two generations at once (5G anchored on LTE), the newer one is reported.
    for technology in ("5g", "lte", "umts", "gsm"):
        values = signal.get(technology, _Values())
        radio = ModemSignal(
            technology,
            _number(values.rssi, *RSSI_RANGE),
            _number(values.rsrp, *RSRP_RANGE),
            _number(values.rsrq, *RSRQ_RANGE),
            _number(values.snr, *SINR_RANGE),
        )
        if radio != ModemSignal(technology):
            return radio
    return None


def read_modem(reader: Reader) -> Modem | None:
    """Run `mmcli` if the kernel has modem devices; None if there are none or ModemManager lists none."""
    devices = [
        name
        for directory, prefix in (("wwan", ""), ("usbmisc", "cdc-wdm"), ("net", "wwan"), ("net", "ppp"))
        for name in reader.names(f"{reader.sysfs}/class/{directory}", prefix)
    ]
    if not devices:
        return None
    modem = reader.program(parse_modem, *MODEM_COMMAND)
    if modem is None:
        return None
    radio = reader.program(parse_signal, *SIGNAL_COMMAND)
    return msgspec.structs.replace(modem, radio=radio)


def _decoded(text: str, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise ProbeError(f"not the output of mmcli: {excerpt(text)}") from None


def _number(text: str, low: float, high: float) -> float | None:
    return None if text == UNKNOWN else within(decimal(text), low, high)
