"""Entry point of `edge-runtime`: the parser of all commands, and exit codes.

Every start builds the parsers of all commands, so modules of this package import what is slow (numpy, onnxruntime,
httpx, rich) only inside the functions that need it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from edge_runtime.cli import bundle, chat, config, demo, generate, probe, serve, simulate, top, update
from edge_runtime.common.options import add_version_option
from edge_runtime.common.program import run_program
from edge_runtime.systemd import actions

DESCRIPTION = """\
The board's side of FlexSpec: speculative decoding with a small frozen draft model here and a target model in the cloud,
which verifies every token.

examples:
  edge-runtime demo
  edge-runtime generate "The sea is" --verifier http://127.0.0.1:8500 --max-new-tokens 64
  edge-runtime generate --file prompt.txt --temperature 0.7 --top-p 0.9 --seed 1 --json
  git log -1 | edge-runtime generate --objective balanced --profile raspberry-pi-5 --explain
  edge-runtime generate "The sea is" --num-assistant-tokens 8 --siblings 3
  edge-runtime chat --verifier http://127.0.0.1:8500
  edge-runtime serve --verifier http://127.0.0.1:8500
  edge-runtime probe --once
  edge-runtime simulate --link 4g --profile raspberry-pi-5 --verifier 32b
  edge-runtime service install --now

exit codes: 0 success, 2 bad input, 3 an unusable bundle or target, 4 a verifier that refused or cannot be reached,
1 anything else
"""

# Each module has HELP, DESCRIPTION and add_options(), which sets the default `run`.
COMMANDS = {
    "generate": generate,
    "chat": chat,
    "demo": demo,
    "serve": serve,
    "top": top,
    "probe": probe,
    "simulate": simulate,
    "bundle": bundle,
    "config": config,
    "update": update,
}


def main(arguments: list[str] | None = None) -> int:
    """Run `edge-runtime` with these arguments, by default those of the process. Returns the exit code."""

    def run() -> int:
        options = _parse(sys.argv[1:] if arguments is None else arguments)
        return int(asyncio.run(options.run(options)))

    return run_program("edge-runtime", run)


def _parse(arguments: list[str]) -> argparse.Namespace:
    return build_parser().parse_args(arguments)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-runtime", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_version_option(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, help=module.HELP, description=module.DESCRIPTION, formatter_class=parser.formatter_class
        )
        module.add_options(command)
    actions.add_parser(commands, _run_service_action)
    return parser


async def _run_service_action(options: argparse.Namespace) -> int:
    from edge_runtime.cli.serve_checks import check_installed

    return actions.run_action(options, _parse, check_installed)
