"""What a run would do, said before any weight is read."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlx_distill.console import clock_time
from mlx_distill.data.batch import Batches
from mlx_distill.data.mixture import learned_from
from mlx_distill.disk import free_gib, needed
from mlx_distill.fit import fitted, suggested
from mlx_distill.layout import ROOT
from mlx_distill.memory import decisions, table
from mlx_distill.preflight import Prepared, prepare
from mlx_distill.recipe import Recipe, dump
from mlx_distill.timed import Timed
from mlx_distill.unfetched import Unfetched


def plan_lines(recipe: Recipe, *, trust: bool = False, root: Path = ROOT) -> Iterator[str]:
    """The resolved recipe, then rows, tokens and steps, memory, drive and time, as lines to print.

    Args:
        trust: tokenizers of the models may be Python code.
        root: where run folders are, in which an earlier run of the same recipe may tell how long it takes.

    Raises:
        DistillError: what is wrong with the recipe, as a run would say it.
    """
    with tempfile.TemporaryDirectory() as folder:
        unfetched = Unfetched(Path(folder))
        prepared = prepare(recipe, trust=trust, folder_of=unfetched)
        yield from _lines(recipe, prepared, root)
        if not unfetched.gib:  # it follows from the weights too
            yield f"fingerprint: {prepared.fingerprint}"
    for name, gib in unfetched.gib.items():
        yield f"{name} is not on this machine: a run fetches {gib:.2g} GiB of weights first"


def _lines(recipe: Recipe, prepared: Prepared, root: Path) -> Iterator[str]:
    """Of a recipe as the user wrote it, with `source: auto` undecided."""
    yield dump(prepared.recipe).rstrip()
    yield ""
    yield from _facts(prepared.recipe, prepared)
    yield from table(prepared.memory)
    yield from decisions(recipe, prepared.recipe, prepared.undecided)
    yield from _changes(prepared)
    yield _disk(prepared.recipe, prepared, root)
    yield _time(prepared.recipe, prepared, root)
    yield from prepared.notes


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
    moving, weights = (round(gib * 2**30 / 4) for gib in (prepared.memory.gradients, prepared.memory.weights))
    if recipe.student.method == "full":
        yield f"parameters: about {moving:,}, all of which train"
    else:
        yield f"parameters: about {moving:,} train, of weights of {weights * 4 / 2**30:.2g} GiB"
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
        lengths = [len(row.tokens) for row in labelled]
        seen = "the baseline" if _has_baseline(recipe) else "training on them alone"
        yield (
            f"labelled rows have {min(lengths)} to {max(lengths)} tokens and fill {epoch:.3g} batches; "
            f"{seen} sees them {times:.1f} times"
        )


def _changes(prepared: Prepared) -> Iterator[str]:
    """What would save memory, where there is too little of it."""
    if prepared.memory.fits:
        return
    for one in suggested(prepared.recipe, prepared.estimated):
        how = "the same is learned" if one.same else "not applied by --fit: it changes what is learned"
        yield f"  {one.overrides} saves {one.saves:.2g} GiB ({how})"
    changed, made = fitted(prepared.recipe, prepared.estimated)
    if made:
        after = prepared.estimated(changed)
        ends = "which fits" if after.fits else "which is still too much"
        yield f"run with --fit: {' '.join(one.overrides for one in made)}, to {after.peak:.2g} GiB, {ends}"


def _disk(recipe: Recipe, prepared: Prepared, root: Path) -> str:
    found, free = needed(recipe, prepared), free_gib(root / recipe.name)
    parts = ", ".join(f"{name} {gib:.2g}" for name, gib in found.items())
    return f"drive, GiB: {parts}; together {sum(found.values()):.2g} of {free:.3g} that are free"


def _time(recipe: Recipe, prepared: Prepared, root: Path) -> str:
    """How long it takes, if the same was done before as far as a step that was logged."""
    timed = Timed.of(root / recipe.name, prepared.fingerprint)
    if timed is None or timed.step_seconds is None:
        return "time: unknown until a step has been timed; a run tells what is left from its first line on"
    steps, each, more = recipe.train.steps, timed.step_seconds, ""
    if timed.step < steps:
        left = clock_time(each * (steps - timed.step))
        more += f"; {timed.step} of {steps} steps were done, which leaves {left} to `run --resume`"
    if _has_baseline(recipe) and prepared.train:
        more += "; the baseline's steps, at most as long each, come on top"
    stages = ", ".join(f"{name} {clock_time(took)}" for name, took in timed.stages.items() if took >= 1)
    more += f"; stages took there so far: {stages}" if stages else ""
    whole = clock_time(each * steps)
    return f"time: training {whole}, at {each:.3g} s a step as in {root / recipe.name}{more}"


def _has_baseline(recipe: Recipe) -> bool:
    """Whether the same student is trained on labels alone, too, as `pipeline.train_baseline` decides it."""
    return recipe.evaluate.baseline and (recipe.teacher is not None or recipe.generate.endpoint is not None)


def _writer(recipe: Recipe) -> str:
    """Who answers `data.prompts`."""
    if recipe.all_own:
        return "student itself"
    return "teacher" if recipe.generate.endpoint is None else "server"


def _left_out(prepared: Prepared, key: str) -> str:
    count = prepared.dropped.get(key, 0)
    return f" ({count} more are longer than data.max_tokens)" if count else ""
