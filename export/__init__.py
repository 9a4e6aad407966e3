"""From a target checkpoint to a draft bundle: data, distillation, ONNX export, quantization, evaluation."""
