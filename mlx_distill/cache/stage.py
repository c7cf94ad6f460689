"""The stage of a run that fills the caches of its teachers."""

import os
from pathlib import Path
from typing import Any

from mlx_distill.cache.capture import fill
from mlx_distill.cache.store import Store
from mlx_distill.distributed import ALONE
from mlx_distill.lessons import lessons
from mlx_distill.losses.menu import MENU
from mlx_distill.teacher import Layers
from mlx_distill.work import Work


def store_targets(work: Work) -> dict[str, Any]:
    """Each teacher with `source: cache` reads the rows that its cache lacks, and is unloaded."""
    counted = {}
    for place, (store, read) in filled_caches(work).items():
        rows = lessons(work).encoded
        counted[place] = sum(len(row.tokens) - row.start for row in rows)
        added = store.added()
        rounded = "" if added is None else "; few bits add {:.1e} nats a token, {:.1e} at most".format(*added)
        work.run.console.say(
            f"{place}: cache of {counted[place]} counted tokens in {store.folder}, "
            f"{store.size() / 2**20:.1f} MiB; {read} of {len(rows)} rows were read now{rounded}"
        )
    return counted


def filled_caches(work: Work) -> dict[str, tuple[Store, int]]:
    """The cache of each teacher that has one, with all rows in it, and how many were read for that."""
    filled = {}
    for place, made_of in work.prepared.caches.items():
        if not any(MENU[name].needs_teacher for name in work.recipe.objective):
            continue  # it only writes answers
        rows = lessons(work).encoded
        store = Store(cache_folder(work, place), made_of, place)
        for damage in store.drop_damaged():
            work.run.console.say(f"{damage}; its rows are read again")
        read = 0
        if store.missing(rows):
            live = work.live_teacher(place, Layers(made_of["hidden"]))
            assert live is not None
            title, progress = f"{place}: cache", work.run.progress
            ranks = ALONE if work.is_divided(place) else work.ranks  # all read each shard together
            read = fill(store, live, rows, title=title, progress=progress, ranks=ranks, place=place)
            del live
            work.unload(place)
            work.ranks.share("unload", [None, *[place] * (work.ranks.size - 1)])
        filled[place] = store, read
    return filled


def cache_folder(work: Work, place: str) -> Path:
    shared = work.recipe.teachers[place].cache
    if shared is None or work.ranks.rank:  # rank 0's, wherever it is, is found in the folder of this one
        return work.run.folder / "cache" / place
    return Path(os.path.expanduser(shared))
