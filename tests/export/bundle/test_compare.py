"""Comparing variants of a draft: what is measured, which one is chosen, and resuming."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from edge_runtime.protocol.bundle import read_bundle
from edge_runtime.protocol.errors import DraftError, InputError
from export.bundle import footprint
from export.bundle.build import BundleConfig
from export.bundle.compare import (
    JSON_FILE,
    MARKDOWN_FILE,
    ComparisonConfig,
    DraftVariant,
    choose_variant,
    compare_variants,
)
from export.bundle.footprint import Footprint
from export.cli.main import main

TEXT = "for index in range(10):\n    print(index)\n" * 3
NAMES = ("fused-int8", "fused-int4", "concat-int8", "fused-int8-trimmed")
FOOTPRINT = Footprint(1, 100, 50, 100, 1.0, 0.1)


def make_variant(name: str, size: int, greedy: float, coupled: float) -> DraftVariant:
    return DraftVariant(name, 300, size, 1.0, 0.0, {"T=0": greedy, "T=0.7": 0.0, "T=1": coupled}, FOOTPRINT)


def test_the_smallest_variant_within_the_tolerance_is_chosen() -> None:
    rows = [
        make_variant("fused-fp32", 100, 0.75, 0.65),
        make_variant("fused-fp16", 50, 0.75, 0.65),
        make_variant("fused-int8", 30, 0.70, 0.60),
        make_variant("fused-mixed", 20, 0.69, 0.60),
        make_variant("fused-int4", 10, 0.75, 0.5899),
        make_variant("concat-int8", 5, 0.70, 0.60),
    ]
    assert choose_variant(rows, 0.01).name == "fused-mixed"
    # Never a larger one, however much more is accepted.
    assert choose_variant(rows, 0.005).name == "fused-int8"
    assert choose_variant(rows, 0.02).name == "fused-int4"


@pytest.fixture(scope="module")
def comparison(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> ComparisonConfig:
    config = BundleConfig(tiny_path, tiny_path, "fused", "fp32", TEXT, head_text="for index in range(10):\n")
    return ComparisonConfig(config, tmp_path_factory.mktemp("forms") / "table", 0.01, NAMES)


@pytest.mark.slow
def test_existing_results_are_reused(comparison: ComparisonConfig) -> None:
    output = comparison.output
    table = compare_variants(comparison)
    rows = {row.name: row for row in table.forms}
    assert set(rows) == {"fused-fp32", *NAMES}
    assert rows["fused-fp32"].acceptance == {"T=0": 1.0, "T=0.7": 1.0, "T=1": 1.0}
    assert rows["fused-int4"].file_bytes < rows["fused-int8"].file_bytes < rows["fused-fp32"].file_bytes
    assert rows["fused-int8-trimmed"].head < 30
    assert rows["fused-int8-trimmed"].acceptance["T=1"] < 0.5
    for row in rows.values():
        assert 20e6 < row.footprint.own_bytes < row.footprint.resident_bytes <= row.footprint.peak_bytes < 400e6
        assert 0.0 < row.footprint.milliseconds < 200
        assert row.acceptance == read_bundle(output / row.name).manifest.acceptance
    assert json.loads((output / JSON_FILE).read_text())["chosen"] == table.chosen
    text = (output / MARKDOWN_FILE).read_text()
    assert len(re.findall(r"^\| ", text, re.MULTILINE)) == 1 + len(rows)
    assert f"| **{table.chosen}** |" in text
    # As left behind by a run killed while building one bundle, with another one not measured yet.
    files = {path: path.stat().st_mtime_ns for path in output.rglob("model.onnx")}
    (output / "fused-int4.json").unlink()
    (output / ".fused-int8.partial").mkdir()
    again = compare_variants(comparison)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("model.onnx")} == files
    assert [row for row in again.forms if row.name != "fused-int4"] == [
        r for r in table.forms if r.name != "fused-int4"
    ]


@pytest.mark.slow
def test_variants_of_other_inputs_are_refused(comparison: ComparisonConfig, tiny_path: Path, tmp_path: Path) -> None:
    config = BundleConfig(tiny_path, tiny_path, "fused", "fp32", TEXT)
    output = tmp_path / "table"
    compare_variants(ComparisonConfig(config, output, names=("fused-int8",)))
    with pytest.raises(InputError, match="holds forms of another text, positions; remove it"):
        compare_variants(
            ComparisonConfig(BundleConfig(tiny_path, tiny_path, "fused", "fp32", TEXT * 2, positions=9), output)
        )
    with pytest.raises(InputError, match="holds other files"):
        compare_variants(ComparisonConfig(config, tiny_path))
    with pytest.raises(InputError, match="no form 'fused-int3'; there are fused-fp32, "):
        compare_variants(ComparisonConfig(config, output, names=("fused-int3",)))
    with pytest.raises(InputError, match="no directory"):
        compare_variants(ComparisonConfig(BundleConfig(tiny_path, tmp_path / "none", "fused", "fp32", TEXT), output))


def test_a_bundle_that_does_not_load_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DraftError, match="cannot be measured: no draft bundle at"):
        footprint.measure_footprint(tmp_path)


@pytest.mark.slow
def test_the_command(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text(TEXT)
    arguments = ["forms", str(tiny_path), str(tiny_path), "--text", str(tmp_path / "text"), "--form", "fused-int8"]
    assert main([*arguments, "--tolerance", "0", "--output", str(tmp_path / "forms")]) == 0
    printed = capsys.readouterr().out
    assert "| fused-int8 | 300 | " in printed or "| **fused-int8** | 300 | " in printed
    assert f"the bundle to take is {tmp_path / 'forms' / 'fused-'}" in printed
    assert main([*arguments, "--form", "int8", "--output", str(tmp_path / "forms")]) == 2
    assert "no form 'int8'" in capsys.readouterr().err
