"""The target model: forward passes, KV cache, sampling and verification."""
