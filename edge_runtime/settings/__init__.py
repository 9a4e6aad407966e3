"""The configuration file of a board."""
