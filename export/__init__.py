"""From a target checkpoint to a draft bundle: layouts, training, distillation, ONNX, quantisation, evaluation."""
