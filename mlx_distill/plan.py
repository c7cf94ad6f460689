"""What a run would do, said before any weight is read."""

from collections.abc import Iterator

from mlx_distill.data.batch import Batches
from mlx_distill.data.mixture import learned_from
from mlx_distill.memory import breakdown, decisions
from mlx_distill.preflight import Prepared, prepare
from mlx_distill.recipe import Recipe, dump


def plan_lines(recipe: Recipe) -> Iterator[str]:
    """The resolved recipe, then rows, tokens and steps, as lines to print.

    Raises:
        DistillError: what is wrong with the recipe, as a run would say it.
    """
    prepared = prepare(recipe)
    yield dump(prepared.recipe).rstrip()
    yield ""
    yield from _facts(prepared.recipe, prepared)
    yield breakdown(prepared.memory)
    yield from decisions(recipe, prepared.recipe, prepared.memory)


def _facts(recipe: Recipe, prepared: Prepared) -> Iterator[str]:
    replay = {key: rows for key, (_, rows) in prepared.replay.items()}
    for key, rows in {
        "train": prepared.train,
        **replay,
        "valid": prepared.valid,
        "test": prepared.test,
    }.items():
        if rows:
            tokens = sum(len(row.tokens) for row in rows)
            counted = sum(len(row.tokens) - row.start for row in rows)
            yield f"data.{key}: {len(rows)} rows, {tokens} tokens, {counted} of them counted" + _left_out(
                prepared, key
            )
    if prepared.prompts:
        longest = max(len(asked.tokens) for asked in prepared.prompts)
        samples = recipe.generate.samples
        times = f" {samples} times each" if samples > 1 else ""
        yield (
            f"data.prompts: {len(prepared.prompts)} rows for the {_writer(recipe)} to answer{times}, "
            f"the longest of {longest} tokens" + _left_out(prepared, "prompts")
        )
    yield f"vocabulary: {prepared.vocabulary} tokens"
    if prepared.planned is not None:
        yield f"student, cut out: {prepared.planned.summary}"
    train = recipe.train
    each = train.batch_tokens * train.micro_batches
    yield (
        f"train: {train.steps} steps of about {each} tokens, padding included: {train.steps * each} in all"
    )
    for key, source in learned_from(recipe.data).items():
        if source.weight is not None:
            yield f"data.{key}: drawn with weight {source.weight:g} among the rows to learn from"
    labelled = [row for rows in (prepared.train, *replay.values()) for row in rows]
    if labelled:
        alone = Batches(labelled, train.batch_tokens, recipe.seed)
        epoch = alone.per_epoch / alone.passes
        times = train.steps * train.micro_batches / epoch
        yield f"labelled rows alone fill {epoch:.1f} batches; the baseline sees them {times:.1f} times"
        lengths = [len(row.tokens) for row in labelled]
        yield f"they have {min(lengths)} to {max(lengths)} tokens"
    yield f"fingerprint: {prepared.fingerprint}"


def _writer(recipe: Recipe) -> str:
    """Who answers `data.prompts`."""
    if recipe.all_own:
        return "student itself"
    return "teacher" if recipe.generate.endpoint is None else "server"


def _left_out(prepared: Prepared, key: str) -> str:
    count = prepared.dropped.get(key, 0)
    return f" ({count} more are longer than data.max_tokens)" if count else ""
