"""What both ends agree on: errors, noise and acceptance, messages, the bundle on disk. Imports nothing else of ours."""
