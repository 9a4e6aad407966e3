"""Takes samples of benchmarks, and makes tables, charts and comparisons of them.

examples:
  python -m tests.benchmarks run                            # all; goes on where a killed run stopped
  python -m tests.benchmarks run wire speed --quick         # few samples
  python -m tests.benchmarks run systems --only 4g --repetitions 3   # some scenarios
  python -m tests.benchmarks report wire                    # Markdown and a chart, from the files
  python -m tests.benchmarks compare before/wire.jsonl build/benchmarks/wire.jsonl
  python -m tests.benchmarks readme                         # tables of READMEs, from the files

Machines differ and are noisy: what counts is ratios within one run. `compare` ends with 1 if something is worse.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from dataclasses import replace
from pathlib import Path

from edge_runtime.protocol.errors import FlexSpecError, InputError
from tests.benchmarks.harness import report
from tests.benchmarks.harness.benchmark import Benchmark
from tests.benchmarks.harness.run import take_samples
from tests.benchmarks.harness.samples import ROOT, SampleFile

# Modules of this package that define a BENCHMARK.
NAMES = (
    *("systems", "ablation", "capacity", "update_storm", "energy", "speed", "wire", "service", "probes", "planning"),
)
DIRECTORY = ROOT / "build" / "benchmarks"
READMES = (Path(__file__).parent / "README.md",)


def load_benchmark(name: str) -> Benchmark:
    """Return the benchmark of a module. Raises InputError if there is none of this name."""
    if name not in NAMES:
        raise InputError(f"no benchmark {name!r}: choose among {', '.join(NAMES)}")
    benchmark: Benchmark = importlib.import_module(f"tests.benchmarks.{name}").BENCHMARK
    return benchmark


def run(options: argparse.Namespace) -> int:
    benchmarks = [load_benchmark(name) for name in options.names or NAMES]
    if options.repetitions:
        benchmarks = [
            replace(each, repetitions=options.repetitions, quick_repetitions=options.repetitions) for each in benchmarks
        ]
    take_samples(
        benchmarks,
        options.directory,
        quick=options.quick,
        again=options.again,
        only=options.only,
        without=options.without,
        processes=options.processes,
    )
    return write_reports(options)


def write_reports(options: argparse.Namespace) -> int:
    """Print the tables, and write them and charts beside the samples."""
    for name in options.names or NAMES:
        path = options.directory / f"{name}.jsonl"
        if not options.names and not path.is_file():
            continue
        benchmark, file = load_benchmark(name), SampleFile.load(path)
        text = f"{benchmark.title}\n\n{report.format_table(benchmark, file)}\n\n{report.describe_run(file)}\n"
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        report.save_chart(benchmark, file, path.with_suffix(".png"))
        print(text)
    return 0


def compare(options: argparse.Namespace) -> int:
    old, new = SampleFile.load(options.old), SampleFile.load(options.new)
    changes = report.compare(load_benchmark(new.info.benchmark), old, new)
    print(report.format_changes(changes))
    return int(any(change.verdict == "worse" for change in changes))


def update_readmes(options: argparse.Namespace) -> int:
    tables = {}
    for name in NAMES:
        path = options.directory / f"{name}.jsonl"
        if path.is_file():
            file = SampleFile.load(path)
            tables[name] = f"{report.format_readme(load_benchmark(name), file)}\n\n{report.describe_run(file)}"
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        path.write_text(report.update_readme(text, tables, options.names), encoding="utf-8")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function, text in (
        ("run", run, "take samples, then report"),
        ("report", write_reports, "tables and charts of samples that were taken"),
        ("readme", update_readmes, "update the tables in READMEs"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("names", nargs="*", metavar="BENCHMARK", help=f"of {', '.join(NAMES)} (default: all)")
        command.set_defaults(run=function)
        if name == "run":
            command.add_argument("--quick", action="store_true", help="few samples")
            text = "take samples of scenarios with this text in their names"
            command.add_argument("--only", default="", metavar="TEXT", help=text)
            command.add_argument("--without", metavar="TEXT", help="leave out those with this text in their names")
            text = "samples of each scenario (default: as many as the benchmark says)"
            command.add_argument("--repetitions", type=int, metavar="N", help=text)
            text = "processes that take samples at once, where they do not disturb each other (default: %(default)s)"
            command.add_argument("--processes", type=int, default=1, metavar="N", help=text)
            command.add_argument("--again", action="store_true", help="do not go on with samples of an earlier run")
    comparison = commands.add_parser("compare", help="tell regressions from noise")
    comparison.add_argument("old", type=Path)
    comparison.add_argument("new", type=Path)
    comparison.set_defaults(run=compare)
    for command in commands.choices.values():
        command.add_argument("--directory", type=Path, default=DIRECTORY, help="of the samples (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except FlexSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    # The processes that a run has started end with it; a shell's background job ignores SIGINT.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
