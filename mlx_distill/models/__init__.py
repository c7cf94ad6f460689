"""Models: loading, building and saving them, and what mlx-lm does not give.

`head.py` splits the last projection off, `taps.py` shows hidden states and attention inside a model,
`early_exit.py` answers from a layer before the last.
"""

from mlx_distill.models.loading import (
    Loaded,
    build,
    check_model,
    check_saveable,
    fused,
    load,
    load_tokenizer,
    parameter_count,
    save,
    save_tokenizer,
)

__all__ = [
    "Loaded",
    "build",
    "check_model",
    "check_saveable",
    "fused",
    "load",
    "load_tokenizer",
    "parameter_count",
    "save",
    "save_tokenizer",
]
