"""The harness of the benchmarks: samples on disk, tables, charts, comparisons, and tables in READMEs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from edge_runtime.protocol.errors import InputError
from tests.benchmarks import __main__ as command
from tests.benchmarks.harness import report, samples
from tests.benchmarks.harness.benchmark import Benchmark, Measure, Overview, Quantity, RatioGoal, Scenario, Values
from tests.benchmarks.harness.intervals import median_interval, paired_ratio_interval, quantile_interval, ratio_interval
from tests.benchmarks.harness.run import take_samples
from tests.benchmarks.harness.samples import RunInfo, Sample, SampleFile
from tests.benchmarks.speed import measure_verifier_overhead, run_verifier
from tests.toy_family import FAMILY

SPEED = Quantity("speed", "tokens/s", digits=1, goal=10, higher_is_better=True)
DELAY = Quantity("delay", "ms", digits=0, goal=30)
INFO = RunInfo("toy", "abc", "a machine", "3.11", {"numpy": "2"})


class Killed(Exception):
    """Simulates a kill."""


def benchmark(taken: list[tuple[str, int]], killed_after: int | None = None) -> Benchmark:
    """A benchmark that records which samples it takes."""

    async def measure(scenario: Scenario, repetition: int) -> Values:
        if len(taken) == killed_after:
            raise Killed
        taken.append((scenario.key, repetition))
        return {SPEED.name: 10.0 + repetition, DELAY.name: 40.0}

    @asynccontextmanager
    async def running() -> AsyncIterator[Measure]:
        yield measure

    scenarios = tuple(Scenario({"link": link, "K": "5"}, (SPEED, DELAY)) for link in ("4G", "Wi-Fi"))
    return Benchmark("toy", "A toy", scenarios, running, repetitions=3, quick_repetitions=2)


def file_of(tmp_path: Path, **values: list[float]) -> SampleFile:
    """Samples of both scenarios with these values by quantity."""
    file = SampleFile.create(tmp_path / "toy.jsonl", INFO)
    for scenario in benchmark([]).scenarios:
        for repetition, row in enumerate(zip(*values.values(), strict=True)):
            file.add(Sample(scenario.key, repetition, dict(zip(values, row, strict=True))))
    return file


def test_repetitions_are_interleaved_and_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_commit", lambda: "abc")
    taken: list[tuple[str, int]] = []
    with pytest.raises(Killed):
        take_samples([benchmark(taken, killed_after=3)], tmp_path, quick=False)
    with (tmp_path / "toy.jsonl").open("a") as file:
        file.write('{"scenario": "Wi-Fi, 5", "repe')  # A line that the kill cut.
    (path,) = take_samples([benchmark(taken)], tmp_path, quick=False)
    assert taken == [(key, repetition) for repetition in range(3) for key in ("4G, 5", "Wi-Fi, 5")]
    values = SampleFile.load(path).values()
    assert values["4G, 5", "speed"] == [10, 11, 12]
    assert {len(each) for each in values.values()} == {3}

    take_samples([benchmark(taken)], tmp_path, quick=False)
    assert len(taken) == 6
    monkeypatch.setattr(samples, "_commit", lambda: "def")
    take_samples([benchmark(taken)], tmp_path, quick=True)
    assert len(taken) == 10


def test_processes_share_the_samples_of_a_benchmark(tmp_path: Path) -> None:
    storm = command.load_benchmark("update_storm")
    (alone,) = take_samples([storm], tmp_path / "alone", quick=False)
    (shared,) = take_samples([storm], tmp_path / "shared", quick=False, processes=2)
    assert SampleFile.load(shared).values() == SampleFile.load(alone).values()


def test_a_process_that_fails_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code 1"):
        # There is no module of this name that another process could import.
        take_samples([benchmark([])], tmp_path, quick=False, processes=2)


def test_a_table_has_medians_with_intervals_and_marks_missed_goals(tmp_path: Path) -> None:
    file = file_of(tmp_path, speed=[10.0, 12.0, 11.0], delay=[40.0, 40.0, 40.0])
    assert report.format_table(benchmark([]), file).splitlines() == [
        "| link | K | speed (tokens/s), at least 10.0 | delay (ms), at most 30 |",
        "| --- | --- | --- | --- |",
        "| 4G | 5 | 11.0 (10.0 to 12.0) | **40** |",
        "| Wi-Fi | 5 | 11.0 (10.0 to 12.0) | **40** |",
    ]
    assert (
        "Medians of 3 repetitions, with 95 % intervals (of fewer than five: the range); commit abc"
        in report.describe_run(file)
    )
    report.save_chart(benchmark([]), file, tmp_path / "charts" / "toy.png")
    assert (tmp_path / "charts" / "toy.png").stat().st_size > 1000


def test_scenarios_with_different_quantities_have_a_row_for_each(tmp_path: Path) -> None:
    first, second = benchmark([]).scenarios
    mixed = replace(benchmark([]), scenarios=(first, replace(second, quantities=(DELAY,))))
    lines = report.format_table(mixed, file_of(tmp_path, speed=[9.0], delay=[20.0])).splitlines()
    assert lines[2:] == [
        "| 4G | 5 | speed (tokens/s) | **9.0** | at least 10.0 |",
        "| 4G | 5 | delay (ms) | 20 | at most 30 |",
        "| Wi-Fi | 5 | delay (ms) | 20 | at most 30 |",
    ]


def test_a_benchmark_has_tables_quantiles_and_goals_relative_to_others(tmp_path: Path) -> None:
    late = Quantity("95 % of delays", "ms", quantile=0.95, source=DELAY.name)
    tables = ("here", "there", "elsewhere")
    scenarios = tuple(
        Scenario({"system": system}, (DELAY, late), table, quick=table == "here")
        for table in tables
        for system in ("ours", "theirs")
    )
    goals = {"here": [RatioGoal("ours / theirs", DELAY.name, "here, ours", ("here, theirs", "no, such"), 0.5)]}
    toy = replace(benchmark([]), scenarios=scenarios, ratio_goals=goals)
    file = SampleFile.create(tmp_path / "toy.jsonl", INFO)
    for table in tables[:2]:
        for repetition in range(3):
            file.add(Sample(f"{table}, theirs", repetition, {DELAY.name: 100.0 + repetition}))
            file.add(Sample(f"{table}, ours", repetition, {DELAY.name: 55.0 + repetition}))
    lines = report.format_table(toy, file).splitlines()
    assert [line for line in lines if line.startswith("**")] == ["**here**", "**there**"]
    assert "| ours | **56 (55 to 57)** | 56.90 (55.00 to 57.00) |" in lines
    assert lines[-1] == "| here | ours / theirs | **0.554 (0.550 to 0.559)** | at most 0.5 |"
    report.save_chart(toy, file, tmp_path / "toy.png")
    assert [change.quantity for change in report.compare(toy, file, file)] == [DELAY] * 4


def test_a_readme_has_an_overview_of_several_tables(tmp_path: Path) -> None:
    scenarios = [
        Scenario({"system": system}, (SPEED,), f"on a link of {link} Mbit/s")
        for link in (1, 10, 100)
        for system in ("ours", "theirs")
    ]
    overview = Overview("Links", {f"on a link of {link} Mbit/s": f"{link}" for link in (1, 10, 100)}, (DELAY, SPEED))
    goals = {
        scenario.table: [RatioGoal("delay / theirs", DELAY.name, scenario.key, (f"{scenario.table}, theirs",), 0.5)]
        for scenario in scenarios[::2]
    }
    several = replace(benchmark([]), scenarios=tuple(scenarios), overviews=[overview], ratio_goals=goals)
    file = SampleFile.create(tmp_path / "toy.jsonl", INFO)
    for scenario, delay in zip(scenarios[:3], (10.0, 20.0, 40.0), strict=True):
        file.add(Sample(scenario.key, 0, {DELAY.name: delay, SPEED.name: 5.0}))
    # What was not measured is left out, or said.
    assert report.format_readme(several, file) == (
        "**Links: delay (ms) / speed (tokens/s)**\n\n"
        "| system | 1 | 10 |\n| --- | --- | --- |\n"
        "| ours | 10 / 5.0 | **40** / 5.0 |\n| theirs | 20 / 5.0 | not measured |\n\n"
        "| ratio of means | 1 | 10 | goal |\n| --- | --- | --- | --- |\n"
        "| delay / theirs | 0.500 | not measured | at most 0.5 |"
    )
    assert report.format_readme(benchmark([]), file) == report.format_table(benchmark([]), file)


def test_a_quick_run_takes_the_quick_scenarios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_commit", lambda: "abc")
    taken: list[tuple[str, int]] = []
    toy = benchmark(taken)
    slow = replace(toy, scenarios=(toy.scenarios[0], replace(toy.scenarios[1], quick=False)))
    take_samples([slow], tmp_path, quick=True)
    assert {key for key, _ in taken} == {"4G, 5"}
    take_samples([slow], tmp_path, quick=False, only="4G")
    assert len(taken) == 3
    take_samples([slow], tmp_path, quick=False, without="4G")
    assert len(taken) == 6 and {key for key, _ in taken[3:]} == {"Wi-Fi, 5"}


def test_a_comparison_tells_changes_from_noise(tmp_path: Path) -> None:
    old = file_of(tmp_path, speed=[10.0, 10.1, 9.9, 10.0], delay=[20.0, 35.0, 18.0, 30.0])
    new = file_of(tmp_path, speed=[12.0, 12.1, 11.9, 12.0], delay=[22.0, 33.0, 19.0, 31.0])
    changes = report.compare(benchmark([]), old, new)
    assert [change.verdict for change in changes] == ["better", "noise"] * 2
    assert [change.verdict for change in report.compare(benchmark([]), new, old)] == ["worse", "noise"] * 2
    assert "| 10.0 | 12.0 | 1.200" in report.format_changes(changes)
    elsewhere = replace(new, info=RunInfo("toy", "abc", "another", "3.11", {}))
    with pytest.raises(InputError, match="compare runs of one machine"):
        report.compare(benchmark([]), old, elsewhere)


def test_intervals_hold_the_value_and_narrow_with_more_samples() -> None:
    few, many = median_interval([1.0, 2.0, 3.0]), median_interval([1.0, 2.0, 3.0] * 30)
    assert few.low < few.value < few.high
    assert many.high - many.low < few.high - few.low
    assert ratio_interval([2.0, 2.0], [1.0, 1.0]).value == 2
    assert quantile_interval([1.0, 2.0, 3.0], 1.0).value == 3


def test_pairs_hide_what_differs_among_prompts() -> None:
    old = [10.0, 20.0, 40.0, 80.0]
    paired = paired_ratio_interval([value / 2 for value in old], old)
    assert (paired.low, paired.value, paired.high) == pytest.approx((0.5, 0.5, 0.5))
    assert ratio_interval([value / 2 for value in old], old).high > 1


def test_a_readme_takes_its_tables_from_samples() -> None:
    text = "before\n<!-- benchmark: wire -->\nold\n<!-- end -->\nafter"
    updated = report.update_readme(text, {"wire": "| new |"})
    assert updated == "before\n<!-- benchmark: wire -->\n| new |\n<!-- end -->\nafter"
    assert report.update_readme(updated, {"wire": "| new |"}) == updated
    with pytest.raises(InputError, match="run that benchmark first"):
        report.update_readme(text, {})
    assert report.update_readme(text, {}, ["speed"]) == text


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "load_benchmark", lambda name: benchmark([]))
    monkeypatch.setattr(samples, "_commit", lambda: "abc")
    options = ["toy", "--directory", str(tmp_path)]
    assert command.main(["run", *options]) == 0
    assert "| 4G | 5 | 11.0 (10.0 to 12.0) | **40** |" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.glob("toy.*")} == {".jsonl", ".md", ".png"}
    assert command.main(["run", *options, "--again", "--repetitions", "1"]) == 0
    assert "| 4G | 5 | 10.0 | **40** |" in capsys.readouterr().out
    path = str(tmp_path / "toy.jsonl")
    assert command.main(["compare", path, path]) == 0
    assert "noise" in capsys.readouterr().out
    assert command.main(["compare", path, "missing.jsonl"]) == 2
    assert "run it first" in capsys.readouterr().err


@pytest.mark.parametrize("name", command.NAMES)
def test_every_benchmark_has_scenarios_with_names_of_their_own(name: str) -> None:
    loaded = command.load_benchmark(name)
    assert loaded.name == name
    assert len({scenario.key for scenario in loaded.scenarios}) == len(loaded.scenarios)


@pytest.mark.slow
def test_the_benchmark_of_bare_sockets_speaks_the_protocol() -> None:
    """It builds its requests itself, so that a verifier that has become stricter would refuse them."""
    with run_verifier(FAMILY / "target-v1", "--threads", "1") as url:
        assert measure_verifier_overhead(url, rounds=4) > 0
