"""Link emulator: a board and a cloud in two network namespaces, joined by a configurable link; see `network`."""
