"""mlx_distill: distils a big language model into a small one, on one Mac, in MLX."""

from mlx_distill.blas import prefer_openblas

__version__ = "0.1.0"

# Here, because it must come before the first import of mlx.core anywhere in the package.
BLAS = prefer_openblas()
