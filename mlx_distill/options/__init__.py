"""Every option of a recipe with its meaning and unit, a class a section.

The sections stand in the order in which a batch meets them; `recipe.Recipe` puts them together and checks
what they say of each other.
"""

from mlx_distill.options.data import Data, Reasoning, Source
from mlx_distill.options.generate import Endpoint, Filters, Generate, OnPolicy, Sampling
from mlx_distill.options.grid import MODES, Grid, check_grid, filled
from mlx_distill.options.outcome import Compress, Evaluate, Export, Quantize
from mlx_distill.options.section import Bits, Fraction, Section, Share
from mlx_distill.options.student import KeptSizes, NewTokenizer, Prune, Shape, Sparsity, Student
from mlx_distill.options.teacher import Teacher
from mlx_distill.options.train import Curriculum, Term, Train

__all__ = [
    "MODES",
    "Bits",
    "Compress",
    "Curriculum",
    "Data",
    "Endpoint",
    "Evaluate",
    "Export",
    "Filters",
    "Fraction",
    "Generate",
    "Grid",
    "KeptSizes",
    "NewTokenizer",
    "OnPolicy",
    "Prune",
    "Quantize",
    "Reasoning",
    "Sampling",
    "Section",
    "Shape",
    "Share",
    "Source",
    "Sparsity",
    "Student",
    "Teacher",
    "Term",
    "Train",
    "check_grid",
    "filled",
]
