"""Power from sensors, energy counters and firmware."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.planning.board_profile import SensorLine
from edge_runtime.probes.battery import Battery, Supply
from edge_runtime.probes.firmware import Firmware, parse_pmic, parse_throttled
from edge_runtime.probes.power import PowerProbe, PowerReading, Rail
from edge_runtime.probes.rapl import RaplProbe
from edge_runtime.probes.reader import ProbeError, Reader
from edge_runtime.probes.snapshot import best_power
from tests.edge_runtime.probes.conftest import BOARDS

Make = Callable[..., Reader]


def chip(number: int, name: str, **attributes: object) -> dict[str, str]:
    files = {"name": name, **attributes}
    return {f"sysfs/class/hwmon/hwmon{number}/{file}": f"{value}\n" for file, value in files.items()}


def test_microwatts_of_one_sensor_are_the_board(reader: Make) -> None:
    power = PowerProbe().read(reader(chip(0, "ina226", power1_input=4_250_000, in1_input=5100, curr1_input=820)))
    assert power == PowerReading(4.25, True, "ina226", [Rail("ina226", "", 4.25)])


def test_milliamperes_times_millivolts(reader: Make) -> None:
    power = PowerProbe().read(reader(chip(0, "ina219", in1_input=5000, curr1_input=700)))
    assert power is not None and power.watts == pytest.approx(3.5)


def test_a_labeled_input_rail_is_the_board(reader: Make) -> None:
    rails = {"in1_label": "VDD_IN", "in1_input": 5000, "curr1_input": 2000}
    rails |= {"in2_label": "VDD_SOC", "in2_input": 5000, "curr2_input": 500}
    power = PowerProbe().read(reader(chip(1, "ina3221", **rails)))
    assert power is not None and power.watts == pytest.approx(10.0) and power.whole_board
    assert [rail.label for rail in power.rails] == ["VDD_IN", "VDD_SOC"]


def test_rails_without_labels_are_not_added_up(reader: Make) -> None:
    files = chip(0, "ina219", power1_input=1_000_000) | chip(1, "ina219", power1_input=2_000_000)
    power = PowerProbe().read(reader(files))
    assert power is not None and power.watts is None and not power.whole_board and len(power.rails) == 2


def test_other_chips_are_not_the_board(reader: Make) -> None:
    files = chip(0, "amdgpu", power1_average=30_000_000) | chip(1, "BAT0", power1_input=6_000_000)
    assert PowerProbe().read(reader(files)) is None


def test_a_current_without_voltage_gives_no_power(reader: Make) -> None:
    assert PowerProbe().read(reader(chip(0, "ina219", curr1_input=700))) is None


def battery_line(milliamperes: int, *, milliwatts: int | None = None) -> dict[str, str]:
    """An INA219, whose driver reports power without a sign, at 8 V."""
    milliwatts = 8 * abs(milliamperes) if milliwatts is None else milliwatts
    return chip(0, "ina219", in1_input=8000, curr1_input=milliamperes, power1_input=1000 * milliwatts)


def test_a_sensor_through_which_current_has_flowed_backwards_is_not_the_board(reader: Make) -> None:
    probe = PowerProbe()
    power = probe.read(reader(battery_line(400)))
    assert power is not None and (power.watts, power.note) == (3.2, "")
    power = probe.read(reader(battery_line(-700)))
    assert power is not None and (power.watts, power.whole_board) == (None, False)
    assert power.rails == [Rail("ina219", "", -5.6)]
    assert "current flows backwards through ina219" in power.note and "[sensors.lines]" in power.note
    # It charges now; what flows into the battery is not what the board draws either.
    power = probe.read(reader(battery_line(900)))
    assert power is not None and power.watts is None


@pytest.mark.parametrize("milliamperes", [0, 12])
def test_a_reading_below_what_a_board_draws_is_not_the_board(milliamperes: int, reader: Make) -> None:
    power = PowerProbe().read(reader(battery_line(milliamperes)))
    assert power is not None and power.watts is None and "less than a board draws" in power.note


@pytest.mark.parametrize(
    ("line", "milliamperes", "watts", "on_battery"),
    [
        ("battery", -700, 5.6, True),
        ("battery", 900, None, False),
        ("battery", 0, None, False),
        ("battery-reversed", 700, 5.6, True),
        ("battery-reversed", -900, None, False),
        ("charger", 900, None, None),
        ("board", 900, 7.2, None),
        ("board", -900, 7.2, None),
    ],
)
def test_the_profile_says_which_line_a_sensor_measures(
    line: SensorLine, milliamperes: int, watts: float | None, on_battery: bool | None, reader: Make
) -> None:
    power = PowerProbe({"ina219": line}).read(reader(battery_line(milliamperes)))
    assert power is not None and (power.watts, power.on_battery) == (watts, on_battery)
    assert power.whole_board is (watts is not None) and bool(power.note) is (watts is None)


def test_a_line_may_be_named_with_its_label(reader: Make) -> None:
    rails = {"in1_label": "VBAT", "in1_input": 4000, "curr1_input": 1000}
    rails |= {"in2_label": "VSYS", "in2_input": 5000, "curr2_input": 600}
    at = reader(chip(1, "ina3221", **rails))
    assert PowerProbe({"ina3221 VBAT": "battery", "ina3221 VSYS": "board"}).read(at) == PowerReading(
        3.0, True, "ina3221 VSYS", [Rail("ina3221", "VBAT", 4.0), Rail("ina3221", "VSYS", 3.0)], on_battery=False
    )
    unknown = PowerProbe().read(at)
    assert unknown is not None and unknown.watts is None and "no rail is known" in unknown.note


def test_a_single_sensor_with_the_label_of_another_line_is_not_the_board(reader: Make) -> None:
    files = chip(0, "ina226", in1_label="VBUS_CHARGER", in1_input=5000, curr1_input=900)
    power = PowerProbe().read(reader(files))
    assert power is not None and power.watts is None


def zones(package: int, dram: int) -> dict[str, str]:
    base = "sysfs/class/powercap/intel-rapl:0"
    return {
        f"{base}/name": "package-0\n",
        f"{base}/energy_uj": f"{package}\n",
        f"{base}/max_energy_range_uj": "1000000000\n",
        f"{base}:0/name": "core\n",
        f"{base}:0/energy_uj": f"{package}\n",
        f"{base}:1/name": "dram\n",
        f"{base}:1/energy_uj": f"{dram}\n",
        f"{base}:1/max_energy_range_uj": "1000000000\n",
    }


def test_rapl_needs_two_readings_and_skips_subzones(reader: Make) -> None:
    rapl = RaplProbe()
    assert rapl.read(reader(zones(100, 50), now=10.0)) is None
    power = rapl.read(reader(zones(30_000_100, 5_000_050), now=12.0))
    assert power is not None and not power.whole_board
    assert power.watts == pytest.approx(17.5)
    assert [(rail.label, rail.watts) for rail in power.rails] == [("package-0", 15.0), ("dram", 2.5)]


@given(
    last=st.integers(0, 999_999_999), spent=st.integers(0, 999_999_998), seconds=st.floats(0.1, 100, allow_nan=False)
)
def test_rapl_wraps(last: int, spent: int, seconds: float) -> None:
    counter = {"value": last}

    class Counted(Reader):
        def __init__(self, now: float) -> None:
            self.sysfs, self.now, self.errors = "", now, []

        def names(self, directory: str, prefix: str = "") -> list[str]:
            return ["intel-rapl:0"]

        def text(self, path: str) -> str | None:
            return "package-0"

        def integer(self, path: str) -> int | None:
            return counter["value"] if path.endswith("energy_uj") else 1_000_000_000

    rapl = RaplProbe()
    assert rapl.read(Counted(0.0)) is None
    counter["value"] = (last + spent) % 1_000_000_000
    power = rapl.read(Counted(seconds))
    assert power is not None and power.watts == pytest.approx(spent / 1e6 / seconds)


def test_rapl_without_its_range_starts_again(reader: Make) -> None:
    base = "sysfs/class/powercap/intel-rapl:0"
    rapl = RaplProbe()
    rapl.read(reader({f"{base}/name": "package-0", f"{base}/energy_uj": "500"}, now=0.0))
    assert rapl.read(reader({f"{base}/energy_uj": "100"}, now=1.0)) is None
    power = rapl.read(reader({f"{base}/energy_uj": "3000100"}, now=2.0))
    assert power is not None and power.watts == pytest.approx(3.0)


def test_pmic_rails_are_current_times_voltage() -> None:
    power = parse_pmic((BOARDS / "raspberry-pi-5" / "bin" / "vcgencmd_pmic_read_adc").read_text().strip())
    assert len(power.rails) == 12
    core = next(rail for rail in power.rails if rail.label == "VDD_CORE")
    assert core.watts == pytest.approx(1.3829 * 0.86543210)
    assert power.watts == pytest.approx(sum(rail.watts for rail in power.rails))
    assert not power.whole_board


@pytest.mark.parametrize(
    "text", ["", 'error=1 error_msg="Command not registered"', "EXT5V_V volt(24)=5.15V", "A_A current(0)=1.0V"]
)
def test_no_rails(text: str) -> None:
    with pytest.raises(ProbeError):
        parse_pmic(text)


@pytest.mark.parametrize(("text", "flags"), [("throttled=0x50005", 0x50005), ("50005", 0x50005), ("0", 0)])
def test_flags(text: str, flags: int) -> None:
    assert parse_throttled(text) == flags


def test_the_whole_board_is_better_than_a_part_of_it() -> None:
    whole = PowerReading(5.0, True, "ina219", [])
    unknown = PowerReading(None, False, "", [])
    part = PowerReading(2.0, False, "pmic", [])
    packages = PowerReading(9.0, False, "rapl", [])
    discharging = Supply([Battery("b", "discharging", watts=4.0)], False)
    charging = Supply([Battery("b", "charging", watts=4.0)], True)
    assert best_power(whole, discharging, Firmware(0, part), packages) == whole
    assert best_power(unknown, discharging, Firmware(0, part), packages) == PowerReading(4.0, True, "battery", [])
    assert best_power(None, charging, Firmware(0, part), packages) == part
    assert best_power(None, charging, Firmware(0, None), packages) == packages
    assert best_power(None, None, None, None) is None
