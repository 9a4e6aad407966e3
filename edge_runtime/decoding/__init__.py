"""The speculative decoding loop: `generation.Generation` runs it for one answer."""
