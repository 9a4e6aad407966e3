"""What the benchmark `systems` compares: this project's boards, and the systems that others describe.

distributions   probabilities on the wire, and the rule that accepts a draft token by them
pacing          real forwards that take the time of another verifier or board; `verifier_pacing`: of targets
cloud           the process in the cloud: the verifier, or the one that receives probabilities
board           the process on the board, which asks either
"""
