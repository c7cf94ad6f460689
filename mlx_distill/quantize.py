"""The finished student in few bits, with mlx-lm's round-to-nearest."""

import contextlib
import io

from mlx_distill.errors import RecipeError
from mlx_distill.models import Loaded
from mlx_distill.options import Quantize


def quantized(loaded: Loaded, options: Quantize) -> Loaded:
    """Quantize every matrix that the group size divides, in place, and say so in the config.

    Raises:
        RecipeError: the group size divides no matrix of the model.
    """
    from mlx_lm.utils import quantize_model

    with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints the bits a weight
        model, config = quantize_model(loaded.model, loaded.config, options.group_size, options.bits)
    if not any(hasattr(module, "bits") for _, module in model.named_modules()):
        raise RecipeError(
            f"`quantize.group_size`: {options.group_size} divides no matrix of the student; use 32, "
            "or widths that are multiples of it"
        )
    return Loaded(model, config, loaded.tokenizer)
