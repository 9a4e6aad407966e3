"""`edge-runtime simulate`: its table, its JSON and its errors."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edge_runtime.cli.main import main

QUICK = ["simulate", "--texts", "1", "--link", "wifi", "--profile", "laptop"]


@pytest.mark.slow
def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--verifier", "loaded"]) == 0
    printed = capsys.readouterr().out
    assert "modeled" in printed
    for label in (
        "analytic",
        "streaming",
        "edge-drafted",
        "token by token",
        "best fixed draft *",
        "best single plan *",
    ):
        assert label in printed


@pytest.mark.slow
def test_json_is_reproducible(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for _ in range(2):
        assert main([*QUICK, "--policy", "fixed", "--weights", "270e6", "--temperature", "0.7", "--json"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    record = msgspec.json.decode(printed[0])
    assert record["modeled"] is True and record["policy"] == "fixed"
    ways = record["ways"]
    # The target ended this text before its 128 tokens.
    (tokens,) = {way["tokens"] for way in ways.values()}
    assert 32 < tokens <= 128
    hindsight = ways["best single plan"]
    assert hindsight["hindsight"] and not ways["fixed"]["hindsight"]
    assert all(hindsight["cost_per_token"] <= way["cost_per_token"] * 1.001 for way in ways.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--link", "6g"],
        ["--link", "offline"],
        ["--link", "mahimahi:absent.up:absent.down:40"],
        ["--profile", "abacus"],
        ["--profile", "absent.toml"],
        ["--verifier", "70b"],
        ["--policy", "coin"],
        ["--objective", "beauty"],
        ["--weights", "0"],
        ["--texts", "0"],
        ["--temperature", "0.3"],
        ["--traces", "absent.npz"],
    ],
)
def test_errors_are_one_sentence(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("edge-runtime: ") and error.count("\n") == 1


@pytest.mark.slow
def test_a_link_from_trace_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x.up", "x.down"):
        (tmp_path / name).write_text("".join(f"{time}\n" for time in range(5, 400, 7)))
    link = f"mahimahi:{tmp_path / 'x.up'}:{tmp_path / 'x.down'}:30"
    assert main([*QUICK, "--link", link]) == 0
    assert "mahimahi" in capsys.readouterr().out
