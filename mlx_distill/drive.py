"""A drive that is full or fails: when it takes files again, a run goes on where it was."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_distill.errors import DistillError, Stopped

FULL = (errno.ENOSPC, errno.EDQUOT)
FAILING = (errno.EIO, errno.EROFS, errno.ENXIO, errno.ENODEV, errno.ESTALE)  # broken, or taken away


def stopped_by(error: OSError) -> Stopped | None:
    """What to say where the drive is the reason; None where it is not."""
    if isinstance(error, DistillError):
        return None
    if error.errno in FULL:
        return Stopped(f"the drive is full ({error.filename or 'run folder'}); make room, then go on")
    if error.errno in FAILING:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
        return Stopped(f"the drive fails ({what}); go on when it works again")
    return None


@contextmanager
def resumable_if_full() -> Iterator[None]:
    """Turn a drive that is full or fails into `Stopped`."""
    try:
        yield
    except OSError as error:
        stopped = stopped_by(error)
        if stopped is None:
            raise
        raise stopped from error
