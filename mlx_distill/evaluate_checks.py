"""What `evaluate` must not say, known before anything is read."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mlx_distill.recipe import Recipe

OWN = ("fidelity", "code", "summary", "exact", "choice")  # tasks that read `data.test`
PUBLISHED: tuple[Literal["humaneval", "mbpp"], ...] = ("humaneval", "mbpp")
WRITTEN = ("code", "summary", "exact", *PUBLISHED)  # tasks for which a model writes answers


def evaluation(recipe: "Recipe") -> list[str]:
    """Options for tasks that are not asked for, and tasks without what they need."""
    options, known = recipe.evaluate, type(recipe.evaluate)()
    asked = f"`evaluate.tasks` [{', '.join(options.tasks)}]"
    doubled = next((task for task in options.tasks if options.tasks.count(task) > 1), None)
    mistakes = [] if doubled is None else [f"{asked} names {doubled} twice; drop one"]
    given = [
        name for name in ("temperature", "samples", "tune") if getattr(options, name) != getattr(known, name)
    ]
    if given and not set(options.tasks) & set(WRITTEN):
        mistakes.append(
            f"`evaluate.{given[0]}` is for tasks that score answers, such as code; {asked} have none"
        )
    mistakes += [
        f"`evaluate.files.{task}` says where the problems of {task} are, and {asked} do not ask for them; "
        f"add {task}, or drop it"
        for task in options.files
        if task not in options.tasks
    ]
    if options.limit is not None and not set(options.tasks) & {*PUBLISHED, "harness"}:
        mistakes.append(
            f"`evaluate.limit` {options.limit} is for {', '.join(PUBLISHED)} and harness, and {asked} have "
            "none of them; for your own rows set `data.test.rows`"
        )
    if bool(options.harness) != ("harness" in options.tasks):
        mistakes.append(
            f"`evaluate.harness` {options.harness} names tasks of the harness; add harness to {asked}"
            if options.harness
            else f"{asked}: harness needs names of its tasks in `evaluate.harness`, such as [arc_easy]"
        )
    if options.prompt_lengths != known.prompt_lengths and "speed" not in options.tasks:
        mistakes.append(f"`evaluate.prompt_lengths` are for the task speed; add it to {asked}")
    if "speed" in options.tasks and not options.prompt_lengths:
        mistakes.append("`evaluate.prompt_lengths` []: speed is measured on prompts of one length at least")
    return mistakes
