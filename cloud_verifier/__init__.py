"""The HTTP verifier: it says what the target itself would have said.

    doors       HTTP: routes, servers, and replicas behind one door
    serving     sessions and rounds: who may ask, in which order, and what becomes of it
    model       a target at work: its forwards, its choices, its memory
    versions    target versions at rest: what they are made of, and which of them is served

Each imports what is below it. The commands stand on all four.
"""
