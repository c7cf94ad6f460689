"""Errors that a user can act on: each names the place, the value seen and the next move.

Each is also the built-in kind it stands for, so library users can catch what they expect. The command
line prints the message without a traceback and exits with `exit_code`.
"""


class DistillError(Exception):
    """Base of everything that `mlx_distill` raises on purpose."""

    exit_code = 2


class RecipeError(DistillError, ValueError):
    """The recipe, or an override of it, is wrong."""


class DataError(DistillError, ValueError):
    """A data file, folder or dataset cannot be used."""


class ModelError(DistillError, ValueError):
    """A model folder or repository cannot be used."""


class NotFound(DistillError, FileNotFoundError):
    """A file, folder or repository that the user named is not there."""


class RunFolderError(DistillError, OSError):
    """The run folder cannot be written, or holds another run."""


class MissingExtra(DistillError, ImportError):
    """An optional package is needed; the message says how to install it."""


class SandboxError(DistillError, PermissionError):
    """Nothing on this machine holds the programs that models wrote, and the user has not accepted that."""


class Fault(DistillError, RuntimeError):
    """A check of our own work failed, such as an export that does not equal what was exported."""

    exit_code = 1


class Diverged(DistillError, ArithmeticError):
    """Training left the finite numbers."""

    exit_code = 70


class Stopped(DistillError, RuntimeError):
    """Stopped early for a reason outside the recipe; the run can be resumed."""

    exit_code = 75
