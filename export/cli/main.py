"""Entry point of `draft-export`: builds the parser from the command modules and turns errors into exit codes.

The parser, and the commands `keygen` and `sign`, must work on the base install, without torch. Command modules
therefore import packages of the extra `export` only inside their `run` functions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_runtime.common.extras import describe_missing_extra
from edge_runtime.common.options import add_version_option
from edge_runtime.common.program import run_program
from export.cli import distill, doctor, evaluate, example, family, forms, onnx, policy, prior, quick, record, sign

DESCRIPTION = """\
Makes the frozen draft model: trains it against a target, exports it to ONNX, and packs it into a bundle for boards.

examples:
  draft-export onnx tests/toy_family/target-v1 tests/toy_family/draft-anchor --output /tmp/bundle
  draft-export quick model.gguf --output /tmp/bundle
  draft-export onnx /models/Llama-3.1-8B /models/Llama-3.2-1B --output /tmp/bundle
  draft-export onnx /models/Llama-3.1-8B draft --context 4096 --no-acceptance --output /tmp/bundle
  draft-export forms tests/toy_family/target-v1 tests/toy_family/draft-anchor --output /tmp/forms
  draft-export distill family/target-v1 --chats 12000 --output draft
  draft-export example family
  draft-export family family/target-v1 --output /tmp/family
  draft-export evaluate family/bundle --target target-v1 target-v2 --output /tmp/evaluation
  draft-export doctor /models/Llama-3.1-8B --layout anchor
  draft-export record family/bundle --target family/target-v1 --output acceptance.npz
  draft-export prior acceptance.npz
  draft-export policy --output /tmp/policy
  draft-export keygen maker.key
  draft-export sign /tmp/bundle --key maker.key
"""

COMMANDS = (onnx, quick, example, family, record, sign, distill, forms, evaluate, doctor, policy, prior)

# Top-level modules that only the extra `export` installs.
EXTRA_MODULES = frozenset(
    {
        *("accelerate", "gguf", "gymnasium", "matplotlib", "onnx", "onnx_ir", "onnxruntime_genai", "optimum", "peft"),
        *("safetensors", "stable_baselines3", "torch", "transformers"),
    }
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    options = build_parser().parse_args(arguments)

    def run() -> int:
        _convert_gguf_files(options)
        return int(options.run(options))

    return run_program("draft-export", run, lambda error: describe_missing_extra(error, EXTRA_MODULES, "export"))


def _convert_gguf_files(options: argparse.Namespace) -> None:
    """Replace each model that is a GGUF file by the directory that it is converted into."""
    for name in ("target", "draft", "source", "sibling"):
        value = getattr(options, name, None)
        # A directory or bundle needs no PyTorch to be recognized.
        if isinstance(value, Path) and value.is_file():
            from cloud_verifier.model.converted_checkpoints import resolve_checkpoint

            setattr(options, name, resolve_checkpoint(value))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="draft-export", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_version_option(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
