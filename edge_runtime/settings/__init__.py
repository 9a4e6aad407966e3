"""The settings of a board: one table (`table`), read from TOML and the environment (`loading`)."""
