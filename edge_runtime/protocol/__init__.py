"""What the board and the verifier agree on: sampling, wire messages, bundle format and errors.

Reading order: `sampling` (the rule that makes speculation exact), `messages` (the wire protocol), `bundle` (the draft
model on disk), `errors` (the exception hierarchy). This package imports nothing else of ours.
"""
