"""What a stage asks of the other ranks. Alone, everything here is what one process does anyway."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distill.distributed import sums
from mlx_distill.distributed.dealing import Deal, deal_of
from mlx_distill.distributed.links import Link, Message
from mlx_distill.distributed.watching import Watch
from mlx_distill.errors import Fault
from mlx_distill.options import Train
from mlx_distill.self_teacher import Average

if TYPE_CHECKING:
    from mlx_distill.recipe import Recipe

CHECK = 100  # steps from one comparison of all weights to the next, at most
ROUNDING = 1e-3  # relative difference that machines of another make may come to between two of them

T = TypeVar("T")


class Ranks:
    """This process among those of a run.

    Args:
        rank: of this one. size: how many there are.
        group: of `mx.distributed`; None where there is one alone.
        links: to every other rank from rank 0, in order; to rank 0 from every other.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        group: mx.distributed.Group | None = None,
        links: Sequence[Link] = (),
        watch: Watch | None = None,
    ):
        self.rank, self.size, self.links, self.watch = rank, size, links, watch
        self.group = group

    # Orders of rank 0

    def share(
        self,
        task: str,
        parts: Sequence[Any],
        here: Callable[[Any], Message] = lambda part: Message(None),
        data: bytes = b"",
    ) -> list[Message | None]:
        """Rank 0 lets every rank do its part of a task, and gets what each made of it, in order.

        Args:
            task: a name in `helping.TASKS`.
            parts: plain values, one a rank; None: nothing to do for it.
            here: does the first part.
            data: goes to each of the others too.
        """
        asked = [link for link, part in zip(self.links, parts[1:], strict=True) if part is not None]
        for link in asked:
            link.send({"task": task, "part": parts[link.rank]}, data)
        mine = None if parts[0] is None else here(parts[0])
        replies = {link.rank: link.receive() for link in asked}
        return [mine, *(replies.get(link.rank) for link in self.links)]

    def order(self) -> Message | None:
        """What rank 0 wants of this one next, asleep until then; None: all is done."""
        message = self.links[0].receive()
        return None if message.value is None else message

    def reply(self, made: Message) -> None:
        self.links[0].send(*made)

    def at_loss(self, last_words: Callable[[str], None]) -> None:
        """What is still to be done when another rank has ended, and so this one does."""
        if self.watch is not None:
            self.watch.last_words = last_words

    def finish(self) -> None:
        """All is done. Of rank 0, which tells the others, and of these once they are told."""
        if self.rank == 0:
            for link in self.links:
                link.send(None)
        if self.watch is not None:
            self.watch.done()
        for link in self.links:
            link.close()

    # While all do the same

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's plain value, in order, on every rank. Whoever waits is asleep."""
        if self.size == 1:
            return [value]
        if self.rank:
            self.links[0].send(value)
            return self.links[0].receive().value
        found = [value, *(link.receive().value for link in self.links)]
        for link in self.links:
            link.send(found)
        return found

    def from_first(self, work: Callable[[], Any]) -> Any:
        """What rank 0 gets by doing `work`, plain values, on every rank; the others wait for it, asleep."""
        if self.rank:
            return self.links[0].receive().value
        value = work()
        for link in self.links:
            link.send(value)
        return value

    def every_part(self, items: Sequence[Any], work: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """`work(items)` with the items dealt out in turn; the whole on every rank.

        Args:
            work: makes a list of plain values, one for each item that it gets.
        """
        mine = list(items[self.rank :: self.size])
        parts = self.exchange(work(mine) if mine else [])
        whole: list[Any] = [None] * len(items)
        for rank, part in enumerate(parts):
            whole[rank :: self.size] = part
        return whole

    # Training

    def deal(self, recipe: "Recipe") -> Deal:
        return deal_of(recipe, self.rank, self.size)

    def total(self, tree: Any) -> Any:
        """Sums over all ranks of the arrays of a tree; the same bits everywhere."""
        return tree if self.group is None else sums.total(tree, self.group)

    def same_start(
        self, student: nn.Module, optimizer: Any, averages: Sequence[Average], counters: dict[str, Any]
    ) -> dict[str, Any]:
        """Put rank 0's weights and optimizer in place of this rank's, and give its counters, plain values.

        So the other machines need no checkpoint, and no student of the same first bits.
        """
        if self.group is None:
            return counters
        self._put(
            sums.from_first(_arrays(student, optimizer, averages), self.group), student, optimizer, averages
        )
        return self.from_first(lambda: counters)

    def keep_equal(
        self, step: int, options: Train, student: nn.Module, optimizer: Any, averages: Sequence[Average]
    ) -> str | None:
        """Compare all weights every so often, and where they are saved: made of the same sums, they should be
        the same to the bit.

        Returns:
            a line, where machines that round differently had let them drift apart; rank 0's then stand
            everywhere.

        Raises:
            Fault: they are further apart than rounding explains.
        """
        interval = min(CHECK, options.save_every or CHECK)
        if self.group is None or (step % interval and step < options.steps):
            return None
        mine = _arrays(student, optimizer, averages)
        digests = self.exchange(sums.digest(mine))
        others = [rank for rank, one in enumerate(digests) if one != digests[0]]
        if not others:
            return None
        first = sums.from_first(mine, self.group)
        gaps = self.exchange(sums.gap(_arrays(student), {name: first[name] for name in _arrays(student)}))
        if max(gaps) > ROUNDING:
            raise Fault(
                f"step {step}: the weights of rank {gaps.index(max(gaps))} are {max(gaps):.1g} off those of "
                "rank 0; go on with --resume from the last checkpoint, and please report this"
            )
        self._put(first, student, optimizer, averages)
        told = ", ".join(f"rank {rank} by {gaps[rank]:.1e}" for rank in others)
        return f"step {step}: weights had drifted apart ({told}, relative): these machines round differently"

    def _put(
        self, arrays: dict[str, mx.array], student: nn.Module, optimizer: Any, averages: Sequence[Average]
    ) -> None:
        by_owner: dict[str, dict[str, mx.array]] = {}
        for name, array in arrays.items():
            owner, _, rest = name.partition("/")
            by_owner.setdefault(owner, {})[rest] = array
        student.load_weights(list(by_owner["student"].items()), strict=False)
        optimizer.state = tree_unflatten(list(by_owner["optimizer"].items()))
        for place, average in enumerate(averages):
            average.put(by_owner[f"average {place}"])
        mx.eval(student.state, optimizer.state, [one.weights for one in averages])


ALONE = Ranks()


def _arrays(
    student: nn.Module, optimizer: Any = None, averages: Sequence[Average] = ()
) -> dict[str, mx.array]:
    """All that a step changes, by owner and name."""
    trees: dict[str, Any] = {"student": student.trainable_parameters()}
    if optimizer is not None:
        trees["optimizer"] = optimizer.state
    trees |= {f"average {place}": one.weights for place, one in enumerate(averages)}
    found: dict[str, mx.array] = {}
    for owner, tree in trees.items():
        leaves: Any = tree_flatten(tree)
        found |= {f"{owner}/{name}": array for name, array in leaves}
    return dict(sorted(found.items()))
