"""The planner's prior of draft acceptance: how the example family's draft does, before there is evidence of its own.

Measured on all versions of the family with `draft-export record --seed 100` and `draft-export prior`, on other texts
than those that simulations replay.

    QUINTILES               by temperature class (greedy, below T=0.85, above) and stage: (mean confidence, acceptance
                            rate) of the draft tokens in each fifth, by confidence
    LAST_STAGE_SHARES       by temperature class: share of tokens that belong to the last stage
    EVALUATED_ACCEPTANCE    by temperature class: acceptance rate in the manifest of the same draft's bundle, on text
                            written by people
    SIBLING_HAZARDS         hit rate of each sibling, given a rejection that no better-ranked one hit
"""

QUINTILES = (
    (
        ((0.24, 0.41), (0.53, 0.68), (0.81, 0.90), (0.96, 0.963), (0.997, 0.985)),
        ((0.41, 0.63), (0.82, 0.87), (0.95, 0.976), (0.99, 0.979), (0.999, 0.997)),
        ((0.71, 0.93), (0.93, 0.996), (0.98, 0.998), (0.995, 0.998), (0.9994, 0.999)),
    ),
    (
        ((0.070, 0.495), (0.46, 0.526), (0.85, 0.71), (0.98, 0.87), (0.9995, 0.978)),
        ((0.23, 0.51), (0.83, 0.77), (0.98, 0.90), (0.999, 0.979), (1.0, 0.998)),
        ((0.68, 0.78), (0.986, 0.915), (0.998, 0.98), (0.9999, 0.985), (1.0, 0.999)),
    ),
    (
        ((0.0034, 0.465), (0.065, 0.465), (0.34, 0.56), (0.79, 0.70), (0.984, 0.925)),
        ((0.016, 0.49), (0.33, 0.60), (0.82, 0.79), (0.975, 0.95), (0.9985, 0.996)),
        ((0.51, 0.725), (0.954, 0.97), (0.993, 0.98), (0.997, 0.985), (0.9996, 0.999)),
    ),
)
LAST_STAGE_SHARES = (0.29, 0.08, 0.04)
EVALUATED_ACCEPTANCE = (0.663, 0.632, 0.631)
SIBLING_HAZARDS = (0.44, 0.29, 0.22, 0.18, 0.16, 0.13, 0.11)
