"""Sizes of Qwen2.5 models with tied embeddings, and of a tiny one for quick tests.

`key_value` is the width of the keys, and of the values: all their heads together.
"""

from __future__ import annotations

MODELS = {
    "0.5B": {"vocab": 151_936, "hidden": 896, "inner": 4864, "layers": 24, "key_value": 128},
    "1.5B": {"vocab": 151_936, "hidden": 1536, "inner": 8960, "layers": 28, "key_value": 256},
    "tiny": {"vocab": 4_096, "hidden": 128, "inner": 512, "layers": 4, "key_value": 32},
}
