"""Weights in few bits: rounded to the nearest, with bits where they matter, or learned."""

from mlx_distill.quantize.checks import check_groups
from mlx_distill.quantize.levels import Level, levels, name_of
from mlx_distill.quantize.rounding import bits_per_weight, quantized

__all__ = ["Level", "bits_per_weight", "check_groups", "levels", "name_of", "quantized"]
