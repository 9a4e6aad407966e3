"""Draft models in PyTorch: which tensors they share with their target, and how the two are stored and assembled."""
