"""Reading one batch ahead: while a step is computed, another thread unpacks what the next one needs."""

from collections.abc import Sequence

from mlx_distill.cache.reader import CachedTeacher
from mlx_distill.data.batch import Batch
from mlx_distill.teacher import Teaches
from mlx_distill.train import HasBatches


class Ahead:
    """Batches of which each is announced to the cached teachers while the one before it is learned.

    Args:
        batches: by number, each a function of its number alone.
        total: how many will be asked for.
    """

    def __init__(self, batches: HasBatches, teachers: Sequence[Teaches], total: int):
        self.batches, self.total = batches, total
        self.teachers = [teacher for teacher in teachers if isinstance(teacher, CachedTeacher)]
        self._next: tuple[int, Batch] | None = None

    def __getitem__(self, index: int) -> Batch:
        expected, self._next = self._next, None
        batch = expected[1] if expected is not None and expected[0] == index else self.batches[index]
        if index + 1 < self.total:
            following = self.batches[index + 1]
            for teacher in self.teachers:
                teacher.expect(following)
            self._next = index + 1, following
        return batch
