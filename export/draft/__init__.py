"""Draft training: the base target, distillation losses, teachers, and the training loop."""
