"""Prints what the toy family's draft proposes: to compare processors.

python -m tests.device_profiles.image.proposals
"""

from __future__ import annotations

import json

from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.plan import Plan
from edge_runtime.protocol.sampling import Sampling
from tests.emulator.answer_checker import PROMPTS
from tests.toy_family import FAMILY

TOKENS = 24
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=0.7, top_p=0.9, seed=2),
    Sampling(temperature=1.0, seed=2**64 - 1),
    Sampling(temperature=1.0, top_k=20, min_p=0.02, seed=5),
)


def main() -> None:
    draft = OnnxDraft.load(FAMILY / "bundle", threads=1)
    proposals = []
    for prompt in PROMPTS:
        ids = draft.tokenizer.encode(prompt).ids
        for sampling in SAMPLINGS:
            proposal = draft.new_context().propose(ids, TOKENS, sampling, Plan(TOKENS, siblings=2))
            proposals.append(proposal.tokens)
    print(json.dumps(proposals))


if __name__ == "__main__":
    main()
