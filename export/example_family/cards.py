"""Model cards of the example family's versions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

FRONT = """---
license: apache-2.0
language: [en]
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
tags: [speculative-decoding, example]
---
"""

ADAPTER = """
# {name}

A LoRA adapter of target v1 (SmolLM2-135M-Instruct) for source code (`{domain}`), which stands for a later version of
the target and shows that a frozen draft remains usable. Half of its training text is chats that target v1 wrote, so
that it answers questions as before. It changes no norm, head or embedding, because drafts share them.

{steps} steps of {batch} tokens, final training loss {loss:.3f} nats. Load it with PEFT on top of `../target-v1`.
"""

TUNED = """
# target-v4

Target v1 (SmolLM2-135M-Instruct) with blocks {blocks} fine-tuned in full on chats that target v1 wrote and on source
code. Only the {tensors} changed tensors are stored, matrices in 8 bits; `cloud-verifier serve` loads them. Final norm,
head and embedding are unchanged, because drafts share them.

{steps} steps of {batch} tokens, final training loss {loss:.3f} nats.
"""


def write_card(directory: Path, template: str, facts: Mapping[str, object]) -> None:
    """Write `README.md` from one of the templates of this module."""
    (directory / "README.md").write_text(FRONT + template.format(**facts), encoding="utf-8")
