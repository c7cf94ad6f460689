"""How much memory a run takes, stage by stage, estimated from files and shapes alone.

It decides `source: auto`, and tells `plan` and `run` what fits. `models.py` sizes the models, `batches.py`
the batches, `work.py` what layers and losses hold, `phases.py` other stages; `kernels.py` has the constants.
"""

from mlx_distill.memory.estimates import GIB, Estimate, estimate, machine_gib
from mlx_distill.memory.parts import Parts
from mlx_distill.memory.phases import Rows
from mlx_distill.memory.sources import decisions, with_sources
from mlx_distill.memory.words import table

__all__ = [
    "GIB",
    "Estimate",
    "Parts",
    "Rows",
    "decisions",
    "estimate",
    "machine_gib",
    "table",
    "with_sources",
]
