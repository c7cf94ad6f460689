"""The stage that makes the student's models in few bits, one folder for each level."""

from collections.abc import Mapping
from typing import Any

from mlx_distill import models
from mlx_distill.data.batch import Encoded
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.keys import generator
from mlx_distill.lessons import lessons
from mlx_distill.models import Loaded
from mlx_distill.quantize.layerwise import awq_quantized, gptq_quantized, packed
from mlx_distill.quantize.levels import Level, levels
from mlx_distill.quantize.mixed import Harms, allocated, layer_harms
from mlx_distill.quantize.rounding import bits_per_weight, quantized
from mlx_distill.teacher import LiveTeacher
from mlx_distill.work import Work


def quantize_student(work: Work) -> dict[str, Any]:
    """The saved student in few bits, as `models/student-4bit` and others that the recipe asks for.

    Returns:
        models: their names. measured: by name, what was measured while each was made.
    """
    measured: dict[str, Any] = {}
    harms = _layer_harms(work)
    for level in levels(work.recipe.quantize):
        work.run.interrupts.check()  # of a signal that came while the level before was saved
        made, told = _made(work, level, harms)
        work.save(level.name, made)
        measured[level.name] = {**told, "bits_per_weight": bits_per_weight(made.model)}
    return {"models": list(measured), "measured": measured}


def _layer_harms(work: Work) -> Harms | None:
    """What each layer harms at each width, once for all levels; None where all layers have one width."""
    options = work.recipe.quantize
    if options is None or not options.mixed:
        return None
    rows = calibration_rows(work, options.rows)
    return layer_harms(_student(work), options, rows, work.prepared.vocabulary, progress=work.run.progress)


def _made(work: Work, level: Level, harms: Harms | None) -> tuple[Loaded, dict[str, Any]]:
    """The student at one level, and what was measured on the way."""
    options, student = level.options, _student(work)
    bits: Mapping[str, int] | None = None
    told: dict[str, Any] = {}
    if harms is not None:
        rows, vocabulary = calibration_rows(work, options.rows), work.prepared.vocabulary
        bits, told = allocated(student, level, rows, vocabulary, harms=harms, progress=work.run.progress)
    if options.method in ("dwq", "qad"):
        from mlx_distill.quantize.learned import learned_quantized

        del student  # it is loaded there again, beside what it learns from
        made, learned = learned_quantized(work, level, bits)
        return made, {"widths": told} | learned if told else learned
    if options.method == "rtn":
        return quantized(student, level.grid, bits, options.dtype), told
    tokens = packed(calibration_rows(work, options.rows))
    by_layer = awq_quantized if options.method == "awq" else gptq_quantized
    return _nearer(work, level, by_layer(student, level, tokens))


def _nearer(work: Work, level: Level, made: Loaded) -> tuple[Loaded, dict[str, Any]]:
    """What was made, or the student merely rounded where that is no further from the student before.

    It is measured on `data.valid`, or without it on the rows of the calibration.
    """
    rows = work.prepared.valid or calibration_rows(work, level.options.rows)
    vocabulary, progress = work.prepared.vocabulary, work.run.progress
    whole = LiveTeacher(_student(work), vocabulary)
    rounded = quantized(_student(work), level.grid, None, level.options.dtype)

    def kl(loaded: Loaded, how: str) -> float:
        title = f"{level.name}: {how}"
        found, _ = fidelity(loaded.model, rows, vocabulary, teacher=whole, title=title, progress=progress)
        return found["kl"]

    before, after = kl(rounded, "rounded"), kl(made, level.options.method)
    kept = after < before
    work.run.console.say(
        f"{level.name}: KL to the student before {before:.3g} rounded, {after:.3g} by {level.options.method}"
        + ("" if kept else "; the rounded model is kept")
    )
    return made if kept else rounded, {"before_kl": before, "after_kl": after, "kept": kept}


def _student(work: Work) -> Loaded:
    return models.load(str(work.run.model("student")), "student")


def calibration_rows(work: Work, count: int) -> list[Encoded]:
    """At most `count` of the rows that the student learns from, drawn without repetition by the seed.

    Where the student wrote all answers itself and none was kept, they are the questions.
    """
    rows = lessons(work).encoded
    if not rows:
        rows = [Encoded(asked.tokens, 1) for asked in work.prepared.prompts if len(asked.tokens) > 1]
    order = generator(work.recipe.seed, "calibration").permutation(len(rows))[:count]
    return [rows[i] for i in sorted(order.tolist())]
