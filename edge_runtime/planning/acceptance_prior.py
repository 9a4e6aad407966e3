"""The planner's prior of draft acceptance: how the example family's draft does, before there is evidence of its own.

Measured on all versions of the family with `draft-export record --seed 100 --prompts 12` and `draft-export prior`, on
other texts than those that simulations replay.

    QUINTILES               by temperature class (greedy, below T=0.85, above) and stage: (mean confidence, acceptance
                            rate) of the draft tokens in each fifth, by confidence
    LAST_STAGE_SHARES       by temperature class: share of tokens that belong to the last stage
    EVALUATED_ACCEPTANCE    by temperature class: acceptance rate in the manifest of the same draft's bundle, on text
                            written by people
    SIBLING_HAZARDS         hit rate of each sibling, given a rejection that no better-ranked one hit
"""

QUINTILES = (
    (
        ((0.1828, 0.351), (0.4222, 0.602), (0.6461, 0.817), (0.869, 0.926), (0.987, 0.99)),
        ((0.3111, 0.53), (0.661, 0.81), (0.9023, 0.969), (0.9773, 0.986), (0.9977, 1)),
        ((0.641, 0.879), (0.9075, 0.987), (0.9661, 0.992), (0.9877, 0.992), (0.9985, 1)),
    ),
    (
        ((0.05113, 0.281), (0.3647, 0.474), (0.7638, 0.713), (0.9606, 0.857), (0.9986, 0.978)),
        ((0.2095, 0.394), (0.7849, 0.747), (0.9782, 0.946), (0.9976, 0.98), (0.9999, 0.997)),
        ((0.7556, 0.775), (0.9858, 1), (0.9966, 1), (0.9995, 1), (1, 1)),
    ),
    (
        ((0.001416, 0.34), (0.03411, 0.383), (0.2304, 0.524), (0.6425, 0.712), (0.9552, 0.928)),
        ((0.004416, 0.384), (0.1275, 0.457), (0.5326, 0.644), (0.8869, 0.883), (0.9926, 0.982)),
        ((0.004416, 0.384), (0.1275, 0.457), (0.5326, 0.644), (0.8869, 0.883), (0.9926, 0.982)),
    ),
)
LAST_STAGE_SHARES = (0.22, 0.079, 0.0055)
EVALUATED_ACCEPTANCE = (0.6245, 0.603, 0.5985)
SIBLING_HAZARDS = (0.39, 0.26, 0.2, 0.16, 0.13, 0.12, 0.1)
