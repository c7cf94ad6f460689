"""`python -m mlx_distill`: the same as the command `mlx-distill`."""

from mlx_distill.cli import main

main()
