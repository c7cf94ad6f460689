"""What a `compress` section and the rest of a recipe must not say of each other."""

from typing import TYPE_CHECKING

from mlx_distill.metrics import QUALITY, SCORES
from mlx_distill.options import MODES

if TYPE_CHECKING:
    from mlx_distill.recipe import Recipe


def score_of(recipe: "Recipe", asked: str | None) -> str | None:
    """The score by which its models are compared: `asked`, or the first one of a task; None without any.

    The first choices of the teacher are a score where no answer is scored.
    """
    if asked is not None:
        return asked
    tasks = [task for task in recipe.evaluate.tasks if task != "fidelity"] + ["fidelity"]
    found = [SCORES[task][0] for task in tasks if task in recipe.evaluate.tasks and task in SCORES]
    return found[0] if found else None


def unmeasured(recipe: "Recipe", score: str) -> str | None:
    """What a recipe lacks to measure this score, as the end of a message; None: nothing."""
    task = next(task for task, scores in SCORES.items() if score in scores)
    if task not in recipe.evaluate.tasks:
        return f"needs {task} in `evaluate.tasks` [{', '.join(recipe.evaluate.tasks)}]; add it"
    _, at, answers = score.partition("pass@")
    if at and int(answers) > recipe.evaluate.samples:
        return f"needs {answers} `evaluate.samples`; got {recipe.evaluate.samples}"
    return None


def compressing(recipe: "Recipe") -> list[str]:
    """Sizes that cannot be made, and scores that cannot be compared with the teacher's."""
    options, prune, quantize = recipe.compress, recipe.student.prune, recipe.quantize
    if options is None:
        return []
    mistakes = []
    if options.ratios and prune is None:
        mistakes.append(
            "`compress.ratios` are targets of `student.prune`, which is missing; add "
            f"{{ratio: {options.ratios[0]:g}}}, or drop them"
        )
    others = [key for key in ("parameters", "gib", "sizes") if getattr(prune, key, None) is not None]
    if options.ratios and others:
        mistakes.append(
            f"`compress.ratios` are targets, and `student.prune.{others[0]}` is another; drop one of the two"
        )
    if options.bits and quantize is not None and quantize.mode in MODES:
        mistakes.append(
            f"`compress.bits`: `quantize.mode` {quantize.mode} has a width of its own; use affine, or drop "
            "them"
        )
    if options.bits and quantize is not None and quantize.gib is not None:
        mistakes.append("`compress.bits` and `quantize.gib` both say how small a model is; drop one of them")
    if recipe.teacher is None:
        mistakes.append("`compress.line` is a share of the teacher's score; name a `teacher`")
    return mistakes + _scoring(recipe)


def _scoring(recipe: "Recipe") -> list[str]:
    assert recipe.compress is not None
    score = score_of(recipe, recipe.compress.score)
    known = [name for scores in SCORES.values() for name in scores]
    if score is None:
        tasks = ", ".join(recipe.evaluate.tasks)
        return [f"`compress` compares scores, and `evaluate.tasks` [{tasks}] give none; add fidelity or code"]
    if score in known:
        lacking = unmeasured(recipe, score)
        return [] if lacking is None else [f"`compress.score` {score} {lacking}"]
    if score in {metric.name for metric in QUALITY}:
        return [
            f"`compress.score` {score} is no score of which the teacher's has a share; use one of "
            f"{', '.join(known)}"
        ]
    return [f"`compress.score`: one of {', '.join(known)}; got {score!r}"]
