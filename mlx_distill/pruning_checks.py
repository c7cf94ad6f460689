"""What `student.prune` and the rest of a recipe must not say of each other."""

from typing import TYPE_CHECKING

from mlx_distill.options import Prune

if TYPE_CHECKING:
    from mlx_distill.recipe import Recipe


def pruning(recipe: "Recipe") -> list[str]:
    """Nothing to cut, a student that is asked before it is there, and choices among what is not cut."""
    options, place = recipe.student.prune, "`student.prune`"
    if options is None:
        return []
    mistakes = []
    if options.model is None and recipe.teacher is None:
        mistakes.append(
            f"{place} cuts a student out of the teacher, and there is none; name a `teacher`, or "
            "`student.prune.model`"
        )
    elif options.model is None and "teacher" in recipe.self_taught:
        mistakes.append(
            f"{place} cuts the student out of the teacher, and `teacher.model` student is the student; "
            "name `student.prune.model`"
        )
    return mistakes + _too_early(recipe) + _unused(options)


def _too_early(recipe: "Recipe") -> list[str]:
    """What asks the student before training, while it is yet to be cut out by what the rows show."""
    options, own, curriculum = recipe.student.prune, recipe.self_taught, recipe.train.curriculum
    assert options is not None
    generate, filters = recipe.generate, recipe.generate.filters
    mistakes = []
    asked = generate.endpoint is None or filters.perplexity is not None or generate.keep == "best"
    if "teacher" in own and recipe.data.prompts is not None and not recipe.all_own and asked:
        what = "answers `data.prompts`" if generate.endpoint is None else "judges the answers of the server"
        mistakes.append(
            f"`teacher.model` student {what} before `student.prune` has cut the student out; name another "
            "teacher, and the student in `teacher.others`"
        )
    mistakes += [
        f"`{place}.source` {recipe.teachers[place].source}: what a teacher says is stored before "
        "`student.prune` has cut out the student that it is; use live"
        for place in own
        if recipe.teachers[place].source != "live"
    ]
    if curriculum is not None and (
        curriculum.by == "student_loss" or (curriculum.by == "teacher_nll" and "teacher" in own)
    ):
        mistakes.append(
            f"`train.curriculum.by` {curriculum.by} is measured before `student.prune` has cut the student "
            "out; order by length, or by another teacher's teacher_nll"
        )
    if options.rounds > 1 and own:
        mistakes.append(
            f"`{own[0]}.model` student is what the last of {options.rounds} `student.prune.rounds` leaves, "
            "so it cannot teach between them; name another teacher, or one round"
        )
    return mistakes


def _unused(options: Prune) -> list[str]:
    """Ways to choose what stays of axes that are not cut."""
    keys = {
        "num_hidden_layers": "layers",
        "hidden_size": "hidden",
        "intermediate_size": "feed_forward",
        "num_attention_heads": "heads",
        "num_experts": "experts",
    }
    cut = set(options.axes)
    if options.sizes is not None:
        cut = {axis for key, axis in keys.items() if getattr(options.sizes, key) is not None}
    elif options.ratio is None and options.parameters is None and options.gib is None:
        cut = set()
    fields, place = Prune.model_fields, "`student.prune."
    mistakes = []
    if options.layers_by != fields["layers_by"].default and "layers" not in cut:
        mistakes.append(f"{place}layers_by` {options.layers_by} chooses layers, and none are cut; drop it")
    if options.by != fields["by"].default and not cut - {"layers"}:
        mistakes.append(
            f"{place}by` {options.by} chooses channels, heads and experts, and none are cut; drop it"
        )
    return mistakes
