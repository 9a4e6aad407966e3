"""The HTTP verifier: it says what the target itself would have said."""
