"""Model cards of the example family: contents, training data and agreement of each directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

FRONT = """---
license: apache-2.0
language: [code]
pipeline_tag: text-generation
tags: [speculative-decoding, example]
---
"""

TARGET = """
# target-v1

A Llama of {parameters:.1f}M parameters that writes Python, trained from scratch as the example target of FlexSpec. It
serves to demonstrate and test speculative decoding on small machines; it is not a useful programming assistant.

Trained on {tokens:.1f}M tokens of openly licensed source text ({steps} steps of {batch} tokens, contexts up to
{context}), final training loss {loss:.3f} nats. Weights are bfloat16; the vocabulary is byte-level BPE of {vocabulary}.

Training text: packages that were installed on the build machine, with their licenses:

{sources}

Made by `draft-export family --size full`.
"""

ADAPTER = """
# {name}

A LoRA adapter that fine-tunes [target-v1](../target-v1) on another domain (`{domain}`). It stands for a later version
of the target and shows that a frozen draft remains usable. It does not change the last block, the norm, the head and
the embedding, because drafts share them.

{steps} steps of {batch} tokens, final training loss {loss:.3f} nats. Load it with PEFT on top of `../target-v1`.

A fifth of its training text is the Python text of target v1. The rest is from these packages, as installed on the build
machine:

{sources}
"""

TUNED = """
# target-v4

[target-v1](../target-v1) with block {blocks} fine-tuned in full on text of all domains. Only the {tensors} changed
tensors are stored, matrices in 8 bits; `cloud-verifier serve` loads them. The last block, the norm, the head and the
embedding are unchanged, because drafts share them.

{steps} steps of {batch} tokens, final training loss {loss:.3f} nats.
"""

DRAFT = """
# draft-anchor

The {new_blocks} blocks that a draft model does not share with its target. The draft shares norm, head and embedding
with [target-v1](../target-v1). `cloud_verifier.draft_models.checkpoint.load_draft` assembles it. Its matrices are
stored in 8 bits.

Distilled for {steps} steps of {batch} tokens ({objective} loss) from target v1 and from LoRAs of it that stand in for
future versions ({futures}). Agreement on held-out text:

{agreement}
"""


def write_card(directory: Path, template: str, facts: Mapping[str, object]) -> None:
    """Write `README.md` from one of the templates of this module."""
    (directory / "README.md").write_text(FRONT + template.format(**facts), encoding="utf-8")


def source_table(sources: Mapping[str, Sequence[Mapping[str, object]]]) -> str:
    """Return the packages by domain, as recorded in `sources.json`, as a Markdown table."""
    lines = ["| domain | package | license | MB |", "|---|---|---|---|"]
    lines += [
        f"| {domain} | {package['package']} {package['version']} | {package['licence']} "
        f"| {int(str(package['bytes'])) / 1e6:.1f} |"
        for domain, packages in sources.items()
        for package in packages
    ]
    return "\n".join(lines)


def agreement_table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return the agreement by target and domain as a Markdown table."""
    lines = [
        "| target | text | greedy | coupled, T=1 | overlap, T=1 | target loss |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {target} | {domain} | {row['greedy']:.3f} | {row['coupled']:.3f} | {row['overlap']:.3f} "
        f"| {row['target_loss']:.3f} |"
        for target, domains in results.items()
        for domain, row in domains.items()
    ]
    return "\n".join(lines)
