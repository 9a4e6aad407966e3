"""Choices of options whose definitions need the extra `export`; the parser must work without it.

`tests/export/cli/test_main.py` compares them with the definitions.
"""

from __future__ import annotations

# export.bundle.onnx_graph
GRAPH_KINDS = ("fused", "concat")
WEIGHT_TYPES = (
    *("fp32", "fp16", "int8", "int8-head4", "int4-fitted"),
    *("mixed", "int4-head8", "int4-head32", "int4-k", "int4"),
)
# cloud_verifier.draft_models.layouts
LAYOUTS = ("anchor", "prefix", "standalone")
# export.draft.distillation_config and export.evaluate.doctor
DEFAULT_NEW_BLOCKS, DEFAULT_SHARED_BLOCKS = 3, 0
# export.draft.distill
OBJECTIVES = ("kl", "lk", "mixed")
# export.example_family.sizes
FAMILY_SIZES = ("smoke", "full")
