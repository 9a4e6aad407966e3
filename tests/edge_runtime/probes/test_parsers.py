"""Every parser answers unexpected input with a ProbeError and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.probes.firmware import parse_pmic, parse_throttled
from edge_runtime.probes.modem import parse_modem, parse_signal
from edge_runtime.probes.processor import parse_load, parse_times
from edge_runtime.probes.reader import ProbeError, Reader, Roots, decimal, integer
from edge_runtime.probes.route import parse_ipv4, parse_ipv6, parse_metered, read_route
from edge_runtime.probes.wireless import parse_link, parse_wireless
from tests.edge_runtime.probes.conftest import BOARDS


def link(text: str) -> Any:
    return parse_link("wlan0", text)


PARSERS: list[Callable[[str], Any]] = [
    decimal,
    integer,
    link,
    parse_ipv4,
    parse_ipv6,
    parse_load,
    parse_metered,
    parse_modem,
    parse_pmic,
    parse_signal,
    parse_throttled,
    parse_times,
    parse_wireless,
]
RECORDED = sorted(
    {path.read_text() for path in BOARDS.rglob("*") if path.is_file() and path.parent.name in ("bin", "net", "procfs")}
)


@st.composite
def nearly_right(draw: st.DrawFn) -> bytes:
    """Recorded text with one part removed and another inserted."""
    content = draw(st.sampled_from(RECORDED)).encode()
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(len(content), start + 40)))
    words = st.sampled_from(
        ["0", "-1", "ff", "99999999999999999999999", "--", "nan", "\n", " ", "\x1c", "²", '"', "{}"]
    )
    return content[:start] + draw(st.one_of(st.binary(max_size=8), words.map(str.encode))) + content[end:]


@pytest.mark.slow
@pytest.mark.parametrize("parse", PARSERS, ids=lambda parse: parse.__name__)
@settings(max_examples=150)
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode), nearly_right()))
def test_any_bytes(parse: Callable[[str], Any], content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    reader = Reader(Roots(), 0.0)
    value = reader.parsed(str(tmp_path / "file"), parse)
    if reader.errors:
        assert value is None
        assert str(tmp_path / "file") in reader.errors[0]


@pytest.mark.slow
@settings(max_examples=200)
@given(content=nearly_right(), version=st.sampled_from(["route", "ipv6_route"]))
def test_any_routing_table(content: bytes, version: str, tmp_path: Path) -> None:
    (tmp_path / "net").mkdir(exist_ok=True)
    (tmp_path / "net" / version).write_bytes(content)
    read_route(Reader(Roots(tmp_path, tmp_path), 0.0))


@pytest.mark.parametrize("parse", PARSERS, ids=lambda parse: parse.__name__)
def test_nonsense(parse: Callable[[str], Any]) -> None:
    for text in ("\x00\x01", "[" * 100_000, "Connected", "١٢٣", "1_000", "nan", "inf", "1e5."):
        with pytest.raises(ProbeError):
            parse(text)
