"""Everything that runs on the board. Never imports torch, transformers or optimum."""

import os

# From 1.31 on onnxruntime reports on its use to its maker, over whatever link there is. It looks here when it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
