"""One run on several machines, or in several processes of one, as `mlx.launch` starts them.

    ranks.py     what a stage asks of the others: work to share, sums over all, weights kept equal
    dealing.py   which rank computes which micro-batches of a step
    sums.py      trees of arrays over `mx.distributed`: added up, handed out, fingerprinted
    links.py     a connection from rank 0 to each other rank, for orders and for files
    watching.py  who notices that a rank has ended, and ends all
    joining.py   from the environment of `mlx.launch` to `Ranks`
    helping.py   what every rank but the first does: it waits for orders
    copies.py    files of rank 0's run folder for the others

A teacher that the ranks hold in parts is `models/divided.py`.

Rank 0 runs the pipeline as if it were alone, writes the run folder and speaks. See docs/distributed.md.
"""

from mlx_distill.distributed.ranks import ALONE, Ranks

__all__ = ["ALONE", "Ranks"]
