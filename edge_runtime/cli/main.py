"""`edge-runtime`: generate text from this board's draft and a verifier."""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import sys
from pathlib import Path

from edge_runtime.cli import bundle as bundles
from edge_runtime.cli import config as configuration
from edge_runtime.cli import memory, planner_options, probe, serve, top, verifier_options
from edge_runtime.cli import simulate as simulation
from edge_runtime.protocol.errors import FlexSpecError, InputError
from edge_runtime.systemd import actions as systemd

FAMILY = Path(__file__).resolve().parents[2] / "export" / "example_family"

DESCRIPTION = """\
The board's half of FlexSpec: drafts with a small frozen model, and lets a verifier in the cloud have the last word.

examples:
  edge-runtime demo
  edge-runtime generate "import os" --verifier http://127.0.0.1:8500 --max-new-tokens 64
  edge-runtime generate --file prompt.txt --temperature 0.7 --top-p 0.9 --seed 1 --json
  git log -1 | edge-runtime generate --objective balanced --profile raspberry-pi-5 --explain
  edge-runtime generate "import os" --num-assistant-tokens 8 --siblings 3
  edge-runtime probe --once
  edge-runtime memory show
  edge-runtime simulate --link 4g --profile raspberry-pi-5 --verifier 32b
  edge-runtime service install --now

exit codes: 0 fine, 2 bad input, 3 the draft bundle is unusable, 4 the verifier refused or cannot be reached
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    try:
        options = _options(arguments)
        return int(asyncio.run(options.run(options)))
    except FlexSpecError as error:
        print(f"edge-runtime: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; so have we. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    """The options, with the configuration where they are silent; `reread` reads both again."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if hasattr(options, "configured"):
        verifier_options.configure(options)
        options = parser.parse_args(arguments)
        options.reread = functools.partial(_options, arguments)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-runtime", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a prompt")
    _add_draft_options(generate)
    generate.add_argument("prompt", nargs="?", help="the text to continue (default: standard input)")
    generate.add_argument("--file", type=Path, help="read the prompt from a file")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    generate.add_argument("--top-k", type=int, default=0, help="0 keeps all (default: %(default)s)")
    generate.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s")
    generate.add_argument("--seed", type=int, default=0, help="same seed, same text (default: %(default)s)")
    generate.add_argument("--ignore-eos", action="store_true", help="go on past the end of the text, for measurements")
    verifier_options.add_options(generate)
    memory.add_options(generate)
    generate.add_argument("--echo", action="store_true", help="print the prompt before its continuation")
    generate.add_argument("--json", action="store_true", help="print one JSON object: text, ids, statistics")
    generate.add_argument("--quiet", action="store_true", help="no line of statistics on standard error")
    generate.set_defaults(run=_generate)

    demo = commands.add_parser("demo", help="start a verifier here, generate with it, and prove that the text is exact")
    _add_draft_options(demo)
    demo.add_argument("--family", type=Path, default=FAMILY, metavar="DIR", help="model family (default: the shipped)")
    demo.add_argument(
        "--target",
        action="append",
        dest="targets",
        metavar="NAME",
        help="target in the family, may repeat (default: target-v1, then target-v2: the same board, a newer target)",
    )
    # What there is to see is drafting; a planner may well find that a verifier next door needs none.
    demo.set_defaults(run=_demo, policy="fixed")

    bundles.add_parser(commands)
    configuration.add_parser(commands)
    memory.add_parser(commands)
    probe.add_parser(commands)
    simulation.add_parser(commands)
    serve.add_parser(commands, generate.get_default("bundle"))
    top.add_parser(commands)
    systemd.add_parser(commands, _service)
    return parser


def _add_draft_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bundle",
        type=Path,
        default=Path(os.environ.get("FLEXSPEC_BUNDLE", FAMILY / "bundle")),
        metavar="DIR",
        help="draft bundle (default: $FLEXSPEC_BUNDLE, else the one shipped with the source)",
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads for the draft (default: one per core, to 4)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    planner_options.add_options(parser)


async def _generate(options: argparse.Namespace) -> int:
    from edge_runtime.cli import generate as generating

    return await generating.generate(options, _prompt(options))


async def _service(options: argparse.Namespace) -> int:
    return systemd.run_action(options, lambda words: _parser().parse_args(words))


async def _demo(options: argparse.Namespace) -> int:
    from edge_runtime.cli import demo

    return await demo.demo(options)


def _prompt(options: argparse.Namespace) -> str:
    if options.prompt is not None and options.file is not None:
        raise InputError("give a prompt or --file, not both")
    if options.file is not None:
        try:
            text: str = options.file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the prompt: {error}") from None
        return text
    if options.prompt is not None:
        return str(options.prompt)
    return sys.stdin.read()
