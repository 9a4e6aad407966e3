"""Everything that runs on the board. Never imports torch, transformers or optimum."""

import os

# Since 1.31 onnxruntime tells its maker how it is used, over whatever link there is, unless it finds this as it loads.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
