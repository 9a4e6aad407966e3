"""The local service: OpenAI's HTTP API for programs on the board and on its network."""
