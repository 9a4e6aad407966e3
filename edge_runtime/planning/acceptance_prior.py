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
        ((0.1642, 0.335), (0.4023, 0.639), (0.6512, 0.764), (0.8749, 0.9), (0.9874, 0.986)),
        ((0.3448, 0.568), (0.7176, 0.832), (0.9258, 0.948), (0.9881, 0.997), (0.9983, 1)),
        ((0.6679, 0.856), (0.9198, 0.98), (0.9757, 0.996), (0.9933, 1), (0.9987, 1)),
    ),
    (
        ((0.04575, 0.248), (0.3511, 0.434), (0.7624, 0.65), (0.9613, 0.852), (0.9986, 0.968)),
        ((0.2735, 0.415), (0.8775, 0.779), (0.9871, 0.935), (0.9989, 0.983), (1, 1)),
        ((0.7264, 0.766), (0.9879, 1), (0.9975, 1), (0.9996, 1), (1, 1)),
    ),
    (
        ((0.001079, 0.319), (0.03193, 0.34), (0.2253, 0.499), (0.6526, 0.695), (0.9643, 0.938)),
        ((0.00352, 0.313), (0.1203, 0.453), (0.5436, 0.66), (0.9033, 0.86), (0.9928, 0.973)),
        ((0.00352, 0.313), (0.1203, 0.453), (0.5436, 0.66), (0.9033, 0.86), (0.9928, 0.973)),
    ),
)
LAST_STAGE_SHARES = (0.23, 0.068, 0.0014)
EVALUATED_ACCEPTANCE = (0.607, 0.583, 0.567)
SIBLING_HAZARDS = (0.35, 0.25, 0.17, 0.13, 0.12, 0.099, 0.073)
