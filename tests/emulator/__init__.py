"""A link between a board and a cloud, each in a network namespace, that is as bad as a test wants it: see `network`."""
