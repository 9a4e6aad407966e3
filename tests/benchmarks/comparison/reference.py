"""Texts of transformers' own `generate`: `python -m tests.benchmarks.comparison.reference TARGET`.

Reads a list of `AnswerCommand` from standard input, and prints the list of their ids, both in JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
import torch

from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.target import load_model
from edge_runtime.protocol.sampling import Sampling
from tests.benchmarks.comparison.board import AnswerCommand


def main() -> None:
    torch.set_num_threads(1)
    model, _, end_ids = load_model(Path(sys.argv[1]).resolve(), "cpu", torch.float32)
    texts = []
    for each in msgspec.json.decode(sys.stdin.buffer.read(), type=list[AnswerCommand]):
        sampling = Sampling(each.temperature, seed=each.seed, ignore_eos=True)
        texts.append(generate_reference(model, each.prompt, sampling, each.tokens, end_ids))
    print(json.dumps(texts))


if __name__ == "__main__":
    main()
