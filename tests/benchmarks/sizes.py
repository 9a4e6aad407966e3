"""Size and speed of drafts of real shapes with random weights, exported and executed.

    python -m tests.benchmarks.sizes                          # all: ten minutes, 10 GB of memory and of disk
    python -m tests.benchmarks.sizes 8B 1+1 --weights int8    # only these shapes and layouts

Of each target only the part that an anchor draft shares with it is created: embedding, last block, norm and head. File
size, memory and times are measured on this machine. The times of boards are modeled: bytes read per token, divided by
the memory bandwidth of the profile (`device_profiles`). The cost of sampling is negligible in comparison.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, LlamaConfig

from cloud_verifier.draft_models.checkpoint import DESCRIPTION_FILE, FORMAT_VERSION, WEIGHTS_FILE, DraftDescription
from cloud_verifier.draft_models.layouts import DraftPlan, draft_config, fingerprint_shared, plan_draft
from edge_runtime.planning.board_profile import find_profile
from edge_runtime.protocol.bundle import read_bundle
from export.bundle.footprint import measure_footprint

COMMON = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "tie_word_embeddings": False}
SHAPES = {
    "7B": {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
    "8B": {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0},
}
LAYOUTS = {"2+1": (2, 1), "1+1": (1, 1)}
# Rows that a trimmed head keeps of 128k; chosen.
TRIMMED_HEAD_ROWS = 32000
CONTEXT = 4096
BOARDS = ("raspberry-pi-5", "jetson-orin-nano")


@dataclass(frozen=True)
class DraftResult:
    """Results of one draft: bytes, seconds, and milliseconds per token."""

    name: str
    parameters: int
    file_bytes: int
    read_bytes: int
    resident_bytes: int
    own_bytes: int
    one_thread: float
    two_threads: float
    export_seconds: float
    export_peak_bytes: int
    boards: dict[str, float]


def make_tokenizer(size: int) -> Tokenizer:
    """Make a byte-level BPE of `size` tokens, pairs and triples of bytes; it takes as much memory as a real one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names, merges = ["<|endoftext|>", *alphabet], []
    parts = [(first, second) for first in alphabet for second in alphabet]
    parts += [(first + second, third) for first, second in parts[: size // 256] for third in alphabet]
    for first, second in parts[: size - len(names)]:
        names.append(first + second)
        merges.append((first, second))
    tokenizer = Tokenizer(BPE(vocab={name: index for index, name in enumerate(names)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_models(plan: DraftPlan, config: LlamaConfig, directory: Path) -> int:
    """Write the shared part of a target, and a draft as `draft_models.checkpoint` stores it.

    Returns the number of parameters of the draft.
    """
    target, own_directory = directory / "target", directory / "draft"
    target.mkdir()
    own_directory.mkdir()
    with torch.device("meta"):
        parameters = dict(AutoModelForCausalLM.from_config(draft_config(config, plan)).named_parameters())
    names = plan.shared_tensors({plan.origin_of(name) for name in parameters})
    # Repeat 17M random numbers, because drawing billions would take longer than the export. Each tensor starts at a
    # different offset, because onnxruntime stores equal weights only once.
    torch.manual_seed(0)
    random_values = torch.empty(1 << 24).normal_(std=0.02).to(torch.bfloat16)

    def values(name: str) -> torch.Tensor:
        shape = parameters[name].shape
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        first = int(torch.randint(random_values.numel(), ()))
        return (
            random_values.repeat(1 + -(-shape.numel() // random_values.numel()))[first:][: shape.numel()]
            .view(shape)
            .clone()
        )

    shared = {target_name: values(name) for name, target_name in names.items()}
    save_file(shared, target / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(target)
    make_tokenizer(config.vocab_size).save(str(target / "tokenizer.json"))
    identity = fingerprint_shared(shared, plan).identity
    del shared
    own = {name: values(name) for name in parameters.keys() - names.keys()}
    save_file(own, own_directory / WEIGHTS_FILE, metadata={"format": "pt"})
    description = DraftDescription(FORMAT_VERSION, config.model_type, plan, identity, tuple(sorted(own)))
    (own_directory / DESCRIPTION_FILE).write_text(json.dumps(asdict(description)))
    return sum(parameter.numel() for parameter in parameters.values())


def run_export(directory: Path, output: Path, weights: str, *options: str) -> tuple[float, int]:
    """Run `draft-export onnx`. Return its duration in seconds and its peak memory in bytes."""
    (directory / "text").write_text("import os\n\nprint(os.getcwd())\n")
    command = [sys.executable, "-m", "export.cli", "onnx", str(directory / "target"), str(directory / "draft")]
    command += ["--weights", weights, "--context", str(CONTEXT), "--text", str(directory / "text"), "--no-acceptance"]
    started = time.monotonic()
    with subprocess.Popen([*command, *options, "--output", str(output)], stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the export ended with {process.returncode}")
    return time.monotonic() - started, usage.ru_maxrss * 1024


def bytes_per_token(graph: Path) -> int:
    """Return the bytes of the weights read per token: all except the embedding and the rotary tables."""
    model = onnx.load(graph, load_external_data=False).graph
    used = {name for node in model.node if node.op_type.startswith("MatMul") for name in node.input}
    sizes = {tensor.name: math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
             for tensor in model.initializer}  # fmt: skip
    return sum(size for name, size in sizes.items() if name in used)


def measure_layout(shape: str, layout: str, weights: str, directory: Path) -> Iterator[DraftResult]:
    """Create one draft in `directory`; export and measure it with its full head and with a trimmed one."""
    config = LlamaConfig(**COMMON, **SHAPES[shape], max_position_embeddings=8192)
    new, shared = LAYOUTS[layout]
    plan = plan_draft(config, "anchor", new_blocks=new, shared_blocks=shared)
    parameters = write_models(plan, config, directory)
    name = f"{shape}, {layout}, {weights}"
    yield measure_draft(name, parameters, directory, weights)
    if config.vocab_size > TRIMMED_HEAD_ROWS:
        tokenizer = Tokenizer.from_file(str(directory / "target" / "tokenizer.json"))
        tokens = (tokenizer.decode([index]) for index in range(1, config.vocab_size))
        (directory / "vocabulary").write_text("\n".join(token for token in tokens if token.isprintable()))
        options = ["--trim-vocabulary", str(directory / "vocabulary"), "--head-size", str(TRIMMED_HEAD_ROWS)]
        parameters -= (config.vocab_size - TRIMMED_HEAD_ROWS) * config.hidden_size
        yield measure_draft(f"{name}, head of {TRIMMED_HEAD_ROWS // 1000}k", parameters, directory, weights, *options)


def measure_draft(name: str, parameters: int, directory: Path, weights: str, *options: str) -> DraftResult:
    """Export and measure the draft that `write_models` wrote."""
    bundle = directory / f"bundle-{len(options)}"
    seconds, peak = run_export(directory, bundle, weights, *options)
    manifest = read_bundle(bundle, verify=False).manifest
    file_bytes = sum(record.bytes for file, record in manifest.files.items() if file.startswith("model"))
    read = bytes_per_token(bundle / "model.onnx")
    # The faster of two runs: other processes can only slow it down.
    one, two = (
        min((measure_footprint(bundle, n), measure_footprint(bundle, n)), key=lambda m: m.milliseconds) for n in (1, 2)
    )
    boards = {board: 1e3 * read / find_profile(board).processor.weight_bytes_per_second for board in BOARDS}
    memory, times = (one.resident_bytes, one.own_bytes), (one.milliseconds, two.milliseconds)
    return DraftResult(name, parameters, file_bytes, read, *memory, *times, seconds, peak, boards)


def format_cells(row: DraftResult) -> list[str]:
    return [
        row.name,
        f"{row.parameters / 1e6:.0f}M",
        f"{row.file_bytes / 1e6:.0f} MB",
        f"{row.read_bytes / 1e6:.0f} MB",
        f"{row.resident_bytes / 1e6:.0f} ({row.own_bytes / 1e6:.0f}) MB",
        f"{row.one_thread:.0f} ms",
        f"{row.two_threads:.0f} ms",
        f"{row.export_seconds:.0f} s",
        f"{row.export_peak_bytes / 1e9:.1f} GB",
        *(f"{row.boards[board]:.0f} ms" for board in BOARDS),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help=f"shapes and layouts, of {', '.join([*SHAPES, *LAYOUTS])}")
    parser.add_argument("--weights", default="int4", help="default: %(default)s")
    parser.add_argument("--directory", type=Path, help="for temporary files (default: the system's)")
    options = parser.parse_args()
    table = Table(
        "draft", "parameters", "file", "read per token", "resident (private)", "1 thread", "2 threads", "export", "peak"
    )
    for board in BOARDS:
        table.add_column(f"{board}, modeled")
    shapes = [shape for shape in SHAPES if shape in options.only] or list(SHAPES)
    layouts = [layout for layout in LAYOUTS if layout in options.only] or list(LAYOUTS)
    for shape in shapes:
        for layout in layouts:
            with tempfile.TemporaryDirectory(prefix="sizes-", dir=options.directory) as directory:
                for result in measure_layout(shape, layout, options.weights, Path(directory)):
                    print(json.dumps(asdict(result)), file=sys.stderr, flush=True)
                    table.add_row(*format_cells(result))
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
