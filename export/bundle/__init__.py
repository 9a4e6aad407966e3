"""Builds bundles: ONNX graphs, quantization, trimmed heads, manifests, signatures, and the comparison of variants."""
