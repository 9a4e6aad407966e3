"""Cost of verification: `python -m tests.benchmarks.verifier forwards|prefill|serving|promotion|sharing|texts`.

forwards   one round of many sessions on models of real shapes with random weights, relative to the floor of reading
           weights and KV cache once
prefill    prompts on the same models, relative to the device's rate for matrices of their dtype
serving    the engine with such a model: streams, boards' drafts, and streams beside prompts of 8,192 tokens that arrive
           without end
promotion  what rounds wait for while adapters are loaded beside them
sharing    tokens per second of the shipped family with 16 sessions in one batch, and one by one
texts      how often a text depends on the batch, the margins at the first difference, and the cost of `exact`
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from cloud_verifier.model.kv_cache import CACHE_FORMATS
from cloud_verifier.model.quantization import METHODS
from tests.benchmarks.verifier.forwards import forwards
from tests.benchmarks.verifier.prefill import prefill
from tests.benchmarks.verifier.promotion import promotion
from tests.benchmarks.verifier.random_models import SHAPES
from tests.benchmarks.verifier.serving import serving
from tests.benchmarks.verifier.texts import sharing, texts

# Streams at once, tokens of each and of its prompt, in `serving`; and the prompts that keep arriving.
STREAMS, STREAM_TOKENS, STREAM_PROMPT, LONG_PROMPT = (1, 16, 64), 128, 512, 8192


def _tokens_and_count(text: str) -> tuple[int, int]:
    tokens, _, count = text.partition("x")
    return int(tokens), int(count or 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("forwards")
    command.add_argument("--shape", nargs="+", default=["7B", "32B"], choices=SHAPES)
    command.add_argument("--sessions", nargs="+", type=int, default=[1, 16, 64])
    command.add_argument("--draft", nargs="+", type=int, default=[0, 5, 16])
    command.add_argument("--context", nargs="+", type=int, default=[512])
    command.add_argument("--exact", action="store_true")
    command.add_argument("--compiled", action="store_true")
    command.add_argument("--quantize", choices=METHODS, help="the floor is still that of bfloat16")
    command.add_argument("--kv-cache-dtype", choices=CACHE_FORMATS, help="the floor is that of this cache")
    command.add_argument("--static", action="store_true", help="compile each number of rows for itself")
    text = "an option of torch's compiler, such as coordinate_descent_tuning=1"
    command.add_argument("--inductor", nargs="+", default=[], metavar="NAME=0|1", help=text)
    command.add_argument("--profile", action="store_true", help="print the CUDA time of a forward by kernel")
    command.set_defaults(run=forwards)
    command = commands.add_parser("prefill")
    command.add_argument("--shape", nargs="+", default=["7B"], choices=SHAPES)
    command.add_argument("--compiled", action="store_true")
    text = "tokens of a prompt, and how many of them at once"
    default = [(512, 1), (2048, 1), (8192, 1), (16384, 1), (2048, 16)]
    command.add_argument("--prompts", nargs="+", type=_tokens_and_count, default=default, metavar="NxM", help=text)
    command.set_defaults(run=prefill)
    command = commands.add_parser("serving")
    command.add_argument("--shape", nargs=1, default=["7B"], choices=SHAPES)
    command.add_argument("--compiled", action="store_true")
    command.add_argument("--streams", nargs="+", type=int, default=STREAMS)
    command.add_argument("--tokens", type=int, default=STREAM_TOKENS)
    command.add_argument("--prompt", type=int, default=STREAM_PROMPT)
    command.add_argument("--long-prompt", type=int, default=LONG_PROMPT)
    command.set_defaults(run=serving)
    command = commands.add_parser("promotion")
    command.add_argument("--shape", nargs=1, default=["7B"], choices=SHAPES)
    command.add_argument("--compiled", action="store_true")
    command.add_argument("--streams", type=int, default=16)
    command.add_argument("--adapters", type=int, default=9)
    command.add_argument("--prompt", type=int, default=STREAM_PROMPT)
    command.add_argument("--tokens", type=int, default=STREAM_TOKENS)
    command.set_defaults(run=promotion)
    for command in commands.choices.values():
        command.add_argument("--json", type=Path, help="add the table, as one JSON line, to this file")
    for name, run in (("sharing", sharing), ("texts", texts)):
        command = commands.add_parser(name)
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--dtype", default="float32")
        command.add_argument("--tokens", type=int, default=128)
        command.add_argument("--json", type=Path, help="add the table, as one JSON line, to this file")
        command.set_defaults(run=run)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
