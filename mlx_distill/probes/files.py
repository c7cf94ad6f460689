"""Teacher and student compared by their files: what the tokenizers do with text, not only what they hold."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.data.rows import Row
from mlx_distill.probes.readings import split_differently
from mlx_distill.probes.turns import other_turns
from mlx_distill.recipe import Recipe
from mlx_distill.teacher_files import TeacherFiles


def compare_tokenizers(
    recipe: Recipe,
    own: Any | None,
    teachers: Mapping[str, TeacherFiles],
    used: Any,
    rows: Mapping[str, Sequence[Row]],
) -> list[str]:
    """Lines on what differs between tokenizers whose maps are equal, and a user should know.

    Teachers with a vocabulary of their own are compared by `objective.cross_tokenizer`, span by span.

    Args:
        own: the tokenizer of a loaded student; None: it has none but its teacher's.
        used: the one that the student trains with: its own, or the first teacher's.

    Raises:
        ModelError: an end of the turn that the student could never learn.
    """
    theirs = {
        f"{place}.model": files.tokenizer
        for place, files in teachers.items()
        if place not in recipe.self_taught and not files.foreign
    }
    prune = recipe.student.prune
    key = "student.model" if prune is None else "student.prune.model"
    loaded = recipe.student.model is not None or (prune is not None and prune.model is not None)
    student = (key, own) if loaded and own is not None else None
    everything = [row for some in rows.values() for row in some]
    named = dict([*([] if student is None else [student]), *theirs.items()])
    reference = next((key for key, tokenizer in named.items() if tokenizer is used), None)
    lines = [] if reference is None else split_differently(named, reference, everything)
    return lines + other_turns(
        student,
        theirs,
        used,
        chats=any(row.text is None for row in everything),
        on_policy=recipe.generate.on_policy is not None,
        all_own=recipe.all_own,
    )
