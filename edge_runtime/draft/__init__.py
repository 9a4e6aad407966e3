"""The ONNX draft model on the board: loading (`model`), graph execution (`onnx_runner`) and sampling (`sampler`)."""
