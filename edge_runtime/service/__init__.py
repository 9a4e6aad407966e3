"""The local service: OpenAI's HTTP surface for programs on and beside the board."""
