"""What the ranks of a run do together, each in a process of its own: `test_distributed.py` starts this.

Prints one JSON object: what this rank found.
"""

import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_distill  # noqa: F401 - before mlx.core: it puts a fast BLAS in front

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from small_models import small_model
from tiny import rows_of, tiny_model, tiny_recipe

from mlx_distill.console import Console
from mlx_distill.data.batch import Batches, at_places, counted_places, make_batch
from mlx_distill.distributed import ALONE, Ranks, sums
from mlx_distill.distributed.joining import joined
from mlx_distill.distributed.links import Message
from mlx_distill.errors import Fault
from mlx_distill.generate import arguments, generate
from mlx_distill.interrupt import Interrupts
from mlx_distill.models import Loaded, parameter_count
from mlx_distill.models.divided import divide, hold, read, together_of
from mlx_distill.options import Sampling, Train
from mlx_distill.run import Run
from mlx_distill.stage_log import StageLog
from mlx_distill.teacher import LiveTeacher
from mlx_distill.train import train

TRAIN = Train.model_validate({"steps": 10})


def held_in_parts(ranks: Ranks, how: Any, kind: str) -> dict[str, Any]:
    """A model that both hold in parts beside the whole one, as rank 0 finds them."""
    whole, parted = small_model(kind).model, small_model(kind).model
    before = parameter_count(parted)
    assert ranks.group is not None
    divide(parted, how, ranks.group, "teacher.model")
    mine = parameter_count(parted)
    if ranks.rank:
        hold(parted, whole, ranks.group)
        while (order := ranks.order()) is not None and order.value["task"] != "over":
            if order.value["task"] == "read":
                read(parted, order.data, order.value["part"]["shape"])
            else:
                generate(parted, **arguments(order.value["part"]))
            ranks.reply(Message(None))
        ranks.reply(Message(None))
        return ranks.from_first(dict)

    def tell(task: str, told: dict[str, Any], data: bytes, here: Callable[[], Any]) -> Any:
        made: list[Any] = []
        ranks.share(task, [told] * 2, lambda _: Message(made.append(here())), data)
        return made[0]

    hold(parted, whole, ranks.group, tell)
    batch = make_batch(rows_of([5, 3]))
    expected = LiveTeacher(Loaded(whole, {}, None), 50).logits(batch.tokens)
    live = LiveTeacher(Loaded(parted, {}, None), 50)
    by_head = live.head.logits(live.targets(batch).last)
    asked: dict[str, Any] = {"stop": {1}, "max_tokens": 12, "batch_size": 2}
    asked |= {"sampling": Sampling(temperature=1.0), "seed": 3, "vocabulary": 50}
    answers = [generate(model, [[5, 6, 7], [8, 9], [4]], **asked) for model in (whole, parted)]
    found = {
        "logits": float(mx.abs(live.logits(batch.tokens) - expected).max()),
        "targets": float(mx.abs(by_head - at_places(expected, counted_places(batch))).max()),
        "held": mine / before,
        "counted": parameter_count(together_of(parted).whole) == before,  # type: ignore[union-attr]
        "same answers": answers[0] == answers[1],
        "tokens": sum(len(answer.tokens) for answer in answers[1]),
    }
    ranks.share("over", [None, {}])
    return ranks.from_first(lambda: found)


def trained(ranks: Ranks) -> list[float]:
    """Loss of each of eight steps of three micro-batches, on rows of very different length."""
    recipe = tiny_recipe(train={"steps": 8, "micro_batches": 3, "batch_tokens": 128, "log_every": 1})
    rows = rows_of([25, 1, 20, 1, 18, 1, 22, 1, 1])
    batches = ranks.deal(recipe).batches(Batches(rows, recipe.train.batch_tokens, recipe.seed))
    teacher = LiveTeacher(tiny_model(50, seed=9), 50)
    with tempfile.TemporaryDirectory() as folder:
        log = StageLog(Run(Path(folder), Console(io.StringIO())), "student")
        train(tiny_model(50).model, [teacher], batches, recipe, 50, log, ranks=ranks)
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def main() -> None:
    sums.BUFFER = 64  # bytes: many buffers, some arrays bigger than one
    with joined(Interrupts()) as ranks:
        rank = ranks.rank
        found: dict[str, Any] = {"rank": rank, "size": ranks.size}
        tree = {
            "wide": mx.arange(40.0) * (rank + 1),
            "half": (mx.full((3, 2), rank + 1.0).astype(mx.bfloat16), mx.ones(5, dtype=mx.float16)),
            "count": mx.array(2**24 - 1 if rank else 1),
            "weight": mx.array(0.5 + rank),
        }
        total = ranks.total(tree)
        found["total"] = {
            "wide": total["wide"].tolist(),
            "half": [total["half"][0].astype(mx.float32).tolist(), str(total["half"][0].dtype)],
            "count": [total["count"].item(), str(total["count"].dtype)],
            "weight": total["weight"].item(),
        }
        found["exchanged"] = ranks.exchange({"of": rank})
        found["parts"] = ranks.every_part(range(7), lambda items: [[item, rank] for item in items])
        found["from_first"] = ranks.from_first(lambda: "of rank 0" if rank == 0 else 1 / 0)

        mx.random.seed(rank)
        student, optimizer = nn.Linear(3, 4), optimizers.AdamW(0.1)
        student.bias = mx.array([-0.0, float("nan"), float("inf"), 1e-45]) if rank == 0 else mx.ones(4)
        optimizer.init(student.trainable_parameters())
        found["counters"] = ranks.same_start(student, optimizer, [], {"step": 3 + rank})
        found["bias"] = student.bias.view(mx.uint32).tolist()
        student.bias = mx.zeros(4)
        found["equal"] = ranks.keep_equal(10, TRAIN, student, optimizer, [])
        student.weight = student.weight * (1 + 1e-6 * rank)
        found["not due"] = ranks.keep_equal(5, TRAIN, student, optimizer, [])
        found["drifted"] = ranks.keep_equal(10, TRAIN, student, optimizer, [])
        found["weight"] = student.weight.view(mx.uint32).tolist()
        student.weight = student.weight * (1 + 0.1 * rank)
        try:
            ranks.keep_equal(10, TRAIN, student, optimizer, [])
        except Fault as error:
            found["fault"] = str(error)

        found["curves"] = [trained(ALONE), trained(ranks)]
        for how, kind in (("tensor", "llama"), ("pipeline", "qwen2")):
            found[how] = held_in_parts(ranks, how, kind)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
