"""Target versions at rest: what they are made of, and which of them is served."""
