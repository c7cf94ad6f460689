"""What a run would do, said before any weight is read."""

from collections.abc import Iterator

from mlx_distill.data.batch import Batches
from mlx_distill.preflight import Prepared, prepare
from mlx_distill.recipe import Recipe, dump


def plan_lines(recipe: Recipe) -> Iterator[str]:
    """The resolved recipe, then rows, tokens and steps, as lines to print.

    Raises:
        DistillError: what is wrong with the recipe, as a run would say it.
    """
    prepared = prepare(recipe)
    yield dump(recipe).rstrip()
    yield ""
    yield from _facts(recipe, prepared)


def _facts(recipe: Recipe, prepared: Prepared) -> Iterator[str]:
    for key, rows in (("train", prepared.train), ("valid", prepared.valid), ("test", prepared.test)):
        if rows:
            tokens = sum(len(row.tokens) for row in rows)
            counted = sum(len(row.tokens) - row.start for row in rows)
            yield f"data.{key}: {len(rows)} rows, {tokens} tokens, {counted} of them counted" + _left_out(
                prepared, key
            )
    if prepared.prompts:
        longest = max(len(tokens) for _, tokens in prepared.prompts)
        yield (
            f"data.prompts: {len(prepared.prompts)} rows for the teacher to answer, "
            f"the longest of {longest} tokens" + _left_out(prepared, "prompts")
        )
    yield f"vocabulary: {prepared.vocabulary} tokens"
    train = recipe.train
    each = train.batch_tokens * train.micro_batches
    yield (
        f"train: {train.steps} steps of about {each} tokens, padding included: {train.steps * each} in all"
    )
    if prepared.train:
        epoch = Batches(prepared.train, train.batch_tokens, recipe.seed).per_epoch
        times = train.steps * train.micro_batches / epoch
        yield f"labelled rows alone fill {epoch} batches; the baseline sees them {times:.1f} times"
        lengths = [len(row.tokens) for row in prepared.train]
        yield f"they have {min(lengths)} to {max(lengths)} tokens"
    yield f"fingerprint: {prepared.fingerprint}"


def _left_out(prepared: Prepared, key: str) -> str:
    count = prepared.dropped.get(key, 0)
    return f" ({count} more are longer than data.max_tokens)" if count else ""
