"""Model cards of the example family: what each directory is, what it was made from, how well it does."""

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
exists to show and test speculative decoding on small machines; it is not a useful programming assistant.

Trained on {tokens:.1f}M tokens of openly licensed source text ({steps} steps of {batch} tokens, contexts up to
{context}), final training loss {loss:.3f} nats. Weights are bfloat16; the vocabulary is byte-level BPE of {vocabulary}.

Training text: packages that were installed on the machine that made it, by licence:

{sources}

Made by `draft-export family --size full`.
"""

ADAPTER = """
# {name}

A LoRA adapter that moves [target-v1](../target-v1) to other text (`{domain}`): a next version of the target, for
showing that a frozen draft outlives it. It leaves the last block, norm, head and embedding as they are, for drafts
contain them.

{steps} steps of {batch} tokens, final training loss {loss:.3f} nats. Load with peft, on top of `../target-v1`.

A fifth of its text is target v1's Python; the rest is from packages that were installed on the machine that made it:

{sources}
"""

TUNED = """
# target-v4

[target-v1](../target-v1) with block {blocks} trained on in full, on text of all domains: stored as the {tensors}
tensors that changed, matrices in 8 bits. `cloud-verifier serve` loads it; the last block, norm, head and embedding are
as they were, for drafts contain them.

{steps} steps of {batch} tokens, final training loss {loss:.3f} nats.
"""

DRAFT = """
# draft-anchor

The part of a draft model that is its own: {new_blocks} blocks. Norm, head and embedding it shares with
[target-v1](../target-v1). Assemble it with `cloud_verifier.draft_models.checkpoint.load_draft`; its matrices
are stored in 8 bits.

Distilled for {steps} steps of {batch} tokens ({objective} loss) from target v1, and from LoRAs of it towards what it
may come to write ({futures}). On held-out text:

{agreement}
"""


def write_card(directory: Path, template: str, facts: Mapping[str, object]) -> None:
    """Writes `README.md` from one of this module's templates."""
    (directory / "README.md").write_text(FRONT + template.format(**facts), encoding="utf-8")


def source_table(sources: Mapping[str, Sequence[Mapping[str, object]]]) -> str:
    """The packages by domain, as recorded in `sources.json`, as one Markdown table."""
    lines = ["| domain | package | licence | MB |", "|---|---|---|---|"]
    lines += [
        f"| {domain} | {given['package']} {given['version']} | {given['licence']} "
        f"| {int(str(given['bytes'])) / 1e6:.1f} |"
        for domain, packages in sources.items()
        for given in packages
    ]
    return "\n".join(lines)


def agreement_table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Agreement by target and domain as a Markdown table."""
    lines = [
        "| target | text | greedy | coupled, T=1 | overlap, T=1 | target's loss |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {target} | {domain} | {row['greedy']:.3f} | {row['coupled']:.3f} | {row['overlap']:.3f} "
        f"| {row['target_loss']:.3f} |"
        for target, domains in results.items()
        for domain, row in domains.items()
    ]
    return "\n".join(lines)
