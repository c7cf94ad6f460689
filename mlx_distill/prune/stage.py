"""The stage that cuts the student out of a bigger model: measure, choose, cut; in rounds, heal and again."""

from typing import Any

import numpy as np

from mlx_distill import models
from mlx_distill.data.batch import Encoded
from mlx_distill.files import write_json
from mlx_distill.learning import learn
from mlx_distill.lessons import lessons
from mlx_distill.models import Loaded, parameter_count
from mlx_distill.options import Prune
from mlx_distill.prune.choose import choose
from mlx_distill.prune.dense import dense_from_experts
from mlx_distill.prune.importance import loss_changes, measure
from mlx_distill.prune.sizes import Kept, Sizes
from mlx_distill.prune.sparse import sparsify
from mlx_distill.prune.surgery import cut
from mlx_distill.prune.vocabulary import with_vocabulary
from mlx_distill.student import add_adapters
from mlx_distill.work import PRUNED, Work


def prune_student(work: Work) -> dict[str, Any]:
    """Cut the student out, as `models/pruned`; what stayed after each round is in `pruning/`."""
    options, planned = work.recipe.student.prune, work.prepared.planned
    if options is None or planned is None:
        return {}
    rows = _rows(work)
    source = model = _source(work, options)
    *earlier, target = planned.rounds
    used = {"train_tokens": 0, "train_seconds": 0.0}
    for number, sizes in enumerate(earlier, 1):
        name = f"round-{number}"

        def cut_and_heal(model: Loaded = model, sizes: Sizes = sizes, name: str = name) -> dict[str, Any]:
            assert options.heal is not None  # the recipe holds it beside `rounds`
            return _heal(work, _cut(work, model, sizes, rows, options, name), name, options.heal)

        healed = work.run.stage(name, cut_and_heal)
        used = {key: used[key] + healed[key] for key in used}
        model = models.load(str(work.run.model(name)), name)
    model = _cut(work, model, target, rows, options, f"round-{len(planned.rounds)}")
    if options.dense:
        model = dense_from_experts(model, measure(model, rows, options.tokens, progress=work.run.progress))
    if options.sparsity is not None:
        read = measure(model, rows, options.tokens, progress=work.run.progress)
        model = sparsify(model, options.sparsity, read)
    work.save(PRUNED, model)
    work.run.console.say(f"cut out: {planned.summary}")
    sizes_of = {"parameters": parameter_count(model.model), "of": parameter_count(source.model)}
    return sizes_of | (used if earlier else {})


def _heal(work: Work, pruned: Loaded, name: str, steps: int) -> dict[str, Any]:
    """Train what a round left for so many steps, as `models/NAME`."""
    train = work.recipe.train
    shorter = train.model_copy(update={"steps": steps, "warmup": min(train.warmup, steps - 1)})
    recipe = work.recipe.model_copy(update={"train": shorter})
    if recipe.student.method != "full":
        add_adapters(pruned.model, recipe.student, recipe.seed)
    used = learn(work, name, pruned, lessons(work), recipe)
    work.save(name, pruned)
    return used._asdict()


def _cut(work: Work, model: Loaded, sizes: Sizes, rows: list[Encoded], options: Prune, name: str) -> Loaded:
    """The model cut to these sizes. What stays is written to `pruning/NAME.json`."""
    progress = work.run.progress
    statistics = measure(model, rows, options.tokens, progress=progress)
    changes = None
    if options.layers_by == "loss" and sizes.layers < len(statistics.influence):
        changes = loss_changes(model, rows, options.tokens, work.prepared.vocabulary, progress=progress)
    kept = choose(model, sizes, options, statistics, seed=work.recipe.seed, changes=changes)
    (work.run.folder / "pruning").mkdir(exist_ok=True)
    write_json(work.run.folder / "pruning" / f"{name}.json", {"sizes": sizes._asdict(), "kept": _plain(kept)})
    return cut(model, kept, statistics.inputs)


def _source(work: Work, options: Prune) -> Loaded:
    """What is cut, with the tokenizer of the run."""
    if options.model is None and work.recipe.teachers["teacher"].quantize is None:
        return work.teacher()._replace(tokenizer=work.prepared.tokenizer)
    name = options.model or work.recipe.teachers["teacher"].model
    loaded = models.load(name, "student.prune.model", trust=work.prepared.trust)
    trimmed = work.prepared.kept_tokens
    if trimmed is not None:
        loaded = with_vocabulary(loaded, work.prepared.tokenizer, trimmed)
    return loaded._replace(tokenizer=work.prepared.tokenizer)


def _rows(work: Work) -> list[Encoded]:
    """Rows to measure on: those to learn from, or the bare questions where the student writes the rest."""
    rows = lessons(work).encoded
    return rows or [Encoded(asked.tokens, 1) for asked in work.prepared.prompts]


def _plain(kept: Kept) -> dict[str, Any]:
    """The choice as plain values; the vocabulary has its own record."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value.tolist()
        return [plain(one) for one in value] if isinstance(value, list) else value

    return {name: plain(value) for name, value in kept._asdict().items() if name != "vocabulary"}
