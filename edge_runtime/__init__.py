"""Everything that runs on the board. Never imports torch, transformers or optimum."""

import os

# Since 1.31 onnxruntime sends usage telemetry over any link, unless this variable is set when it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
