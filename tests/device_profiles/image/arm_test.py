"""Runs the board's tests on aarch64, emulated by qemu-user, with Python 3.11 and 3.13: `make test-arm`.

    python -m tests.device_profiles.image.arm_test
    python -m tests.device_profiles.image.arm_test --python 3.13 tests/edge_runtime/protocol

For each version of Python: what the draft proposes, which is what it proposes on this machine but for how processors
round; answers of the service through a verifier on this machine, which must be the target's own text; and the tests
that need only the board's install (without those marked slow, unless `--slow`). The first run takes longer: it unpacks
a system, and compiles byte code.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter

import httpx

from device_profiles.image.command import _default_cache
from device_profiles.image.programs import ImageError, run
from device_profiles.image.runtime import CHECKOUT
from tests.board_modules import board_test_modules
from tests.device_profiles.image.arm_root import PYTHON_VERSIONS, ArmRoot, prepare_root
from tests.device_profiles.image.boot_test import verifier
from tests.emulator.answer_checker import AnswerCase, AnswerKind, make_cases, request_answer
from tests.toy_family import FAMILY

# Chosen: after the first token that differs, a whole proposal may differ; a wrong kernel would agree on a few percent.
MIN_EQUAL_TOKENS = 0.75
# A limit for hangs of one answer.
ANSWER_SECONDS = 600.0


def main() -> int:
    """Run the tests. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="modules of tests, or directories of them (default: all)")
    parser.add_argument("--python", action="append", choices=PYTHON_VERSIONS, help="default: both versions")
    parser.add_argument("--slow", action="store_true", help="also run the tests marked slow")
    parser.add_argument("--jobs", default=str(os.cpu_count()), help="processes (default: %(default)s)")
    options = parser.parse_args()
    try:
        root = prepare_root(_default_cache(), report)
    except ImageError as error:
        print(f"cannot run arm64 programs: {error}", file=sys.stderr)
        return 1
    cases = make_cases(FAMILY / "target-v1")
    root.add_bundles()
    versions = options.python or PYTHON_VERSIONS
    passed = [check_version(root, version, options, cases) for version in versions]
    return 0 if all(passed) else 1


def check_version(root: ArmRoot, version: str, options: argparse.Namespace, cases: list[AnswerCase]) -> bool:
    """Run everything with one version of Python. Returns whether it passed."""
    report(f"Python {version} on aarch64")
    root.compile_checkout(version)
    if options.paths:
        return run_tests(root, version, options)
    checks = [compare_proposals(root, version), check_answers(root, version, cases)]
    return run_tests(root, version, options) and all(checks)


def run_tests(root: ArmRoot, version: str, options: argparse.Namespace) -> bool:
    """Run pytest in the root. Returns whether no test failed."""
    started = time.monotonic()
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", options.jobs, "--dist", "worksteal"]
    pytest += ["--hypothesis-profile=quick", *([] if options.slow else ["-m", "not slow"])]
    done = subprocess.run(root.command(version, *pytest, *selected_modules(options.paths)))
    report(f"tests: exit code {done.returncode} after {time.monotonic() - started:.0f} s")
    return done.returncode == 0


def selected_modules(paths: list[str]) -> list[str]:
    """Return the modules of tests that need only the board's install, in these directories or of these names."""
    prefixes = [path.rstrip("/") for path in paths] or ["tests"]
    modules = board_test_modules()
    return [name for name in modules if any(name == prefix or name.startswith(f"{prefix}/") for prefix in prefixes)]


def compare_proposals(root: ArmRoot, version: str) -> bool:
    """Compare the tokens that the draft proposes here and there: the same model, in kernels that round differently."""
    module = ["-m", "tests.device_profiles.image.proposals"]
    here, there = (
        json.loads(run(command, cwd=CHECKOUT).stdout)
        for command in ([sys.executable, *module], root.command(version, *module))
    )
    pairs = [pair for ours, theirs in zip(here, there, strict=True) for pair in zip(ours, theirs, strict=True)]
    equal = sum(one == other for one, other in pairs) / len(pairs)
    report(f"proposals of the draft: {equal:.1%} of {len(pairs)} tokens are this machine's")
    return equal > MIN_EQUAL_TOKENS


def check_answers(root: ArmRoot, version: str, cases: list[AnswerCase]) -> bool:
    """Ask the service, which runs in the root, through a verifier on this machine; compare with the target's text."""
    with verifier() as port:
        serve = ["-m", "edge_runtime.cli", "serve", "--port", "0", "--verifier", f"http://127.0.0.1:{port}"]
        serve += ["--bundle", "tests/toy_family/bundle", "--policy", "fixed", "--threads", "1"]
        with subprocess.Popen(root.command(version, *serve), stdout=subprocess.PIPE, text=True) as service:
            try:
                assert service.stdout is not None
                kinds = asyncio.run(ask(service.stdout.readline().split()[-1], cases))
            finally:
                # `unshare` ignores SIGTERM; what it runs dies with it.
                service.kill()
    report(f"answers: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}")
    return set(kinds) == {AnswerKind.RIGHT}


async def ask(url: str, cases: list[AnswerCase]) -> Counter[AnswerKind]:
    """Request every answer, half of them as streams. Returns how many there are of each kind."""
    kinds: Counter[AnswerKind] = Counter()
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS) as client:
        for number, case in enumerate(cases):
            answer = await request_answer(client, case, stream=bool(number % 2), limit=ANSWER_SECONDS)
            kinds[answer.kind] += 1
            if answer.kind != AnswerKind.RIGHT:
                report(f"{answer.kind}: {answer.detail}")
    return kinds


def report(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
