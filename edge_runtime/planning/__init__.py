"""The planner: how many tokens to draft on the board and how many to leave to the verifier, round by round."""
