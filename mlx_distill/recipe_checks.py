"""What the sections of a recipe must not say of each other, known before anything is read.

Each check gives its mistakes as lines that name the option, the value and the next move.
"""

from typing import TYPE_CHECKING

from mlx_distill.compress_checks import compressing
from mlx_distill.data.mixture import learned_from
from mlx_distill.evaluate_checks import evaluation
from mlx_distill.losses import NEEDS_TAIL
from mlx_distill.losses.menu import MENU
from mlx_distill.options import Filters, Generate
from mlx_distill.pruning_checks import pruning
from mlx_distill.quantize.checks import quantization
from mlx_distill.quantize.learned_checks import learned_quantization

if TYPE_CHECKING:
    from mlx_distill.recipe import Recipe


def contradictions(recipe: "Recipe") -> list[str]:
    """Every mistake, in the order in which the sections stand."""
    checks = (
        _teaching,
        _basics,
        evaluation,
        _generation,
        _endpoint,
        _filters,
        _self_taught,
        _on_policy,
        _policy_gradient,
        _curriculum,
        _cache,
        _reasoning,
        _vocabulary,
        pruning,
        quantization,
        learned_quantization,
        compressing,
        _rounded_teachers,
        _divided_teachers,
    )
    return [mistake for check in checks for mistake in check(recipe)]


def _basics(recipe: "Recipe") -> list[str]:
    """What data, student, teacher and lengths say of each other."""
    mistakes = []
    if recipe.teacher is None and recipe.data.prompts is not None and recipe.generate.endpoint is None:
        mistakes.append(
            "`data.prompts` are answered by the teacher; name a `teacher`, or a `generate.endpoint`"
        )
    if recipe.teacher is None and recipe.student.shape is not None and recipe.student.tokenizer is None:
        mistakes.append("`student.shape` needs a `teacher`, for its tokenizer, or `student.tokenizer`")
    foreign = recipe.teacher is not None and "teacher" not in recipe.self_taught
    if foreign and recipe.student.tokenizer is not None and not recipe.across_tokenizers:
        mistakes.append(
            "`student.tokenizer`: with a teacher the student uses the teacher's; "
            "to learn across tokenizers add the loss `cross_tokenizer`"
        )
    if recipe.student.tokenizer is not None and recipe.data.train is None:
        mistakes.append("`student.tokenizer` is trained on `data.train`, which is missing")
    if recipe.train.warmup >= recipe.train.steps:
        steps = recipe.train.steps
        mistakes.append(f"`train.warmup` {recipe.train.warmup} must be less than `train.steps` {steps}")
    if recipe.student.dropout and recipe.train.gradient_checkpointing:
        mistakes.append(
            "`train.gradient_checkpointing` would draw another mask of `student.dropout` "
            f"{recipe.student.dropout:g} as it computes a layer again: a wrong gradient; drop one of them"
        )
    return mistakes


def _teaching(recipe: "Recipe") -> list[str]:
    """Losses that this teacher, or no teacher, cannot give targets for."""
    terms = {name: MENU[name] for name in recipe.objective}
    if recipe.teacher is None:
        return [
            f"objective `{name}` needs a `teacher`" for name, loss in terms.items() if loss.needs_teacher
        ][:1]
    mistakes = []
    for place, teacher in recipe.teachers.items():
        if teacher.source != "live":
            mistakes += [
                f"`{place}.source` {teacher.source} stores no attention or text spans, which "
                f"`objective.{name}` needs; use live"
                for name, loss in terms.items()
                if loss.family in ("attention", "spans")
            ]
        if not teacher.tail:
            mistakes += [
                f"`{place}.tail` false makes `objective.{name}` unsound: {NEEDS_TAIL[name]}"
                for name in terms
                if name in NEEDS_TAIL
            ]
    if not any(loss.family in ("token", "spans") for loss in terms.values()):
        mistakes += [
            f"`objective.{name}.balanced` weighs against losses on logits, and there are none; add one"
            for name, term in recipe.objective.items()
            if term.options.get("balanced")
        ]
    if any(teacher.top_k for teacher in recipe.teachers.values()) and len(recipe.temperatures) > 1:
        mistakes.append(
            "`objective`: with `teacher.top_k` all losses share one temperature, at which the likeliest "
            f"tokens and the rest are kept; got {', '.join(f'{t:g}' for t in sorted(recipe.temperatures))}"
        )
    return mistakes


def _cache(recipe: "Recipe") -> list[str]:
    """Drawn tokens where a loss needs more than an average of them, or nothing is stored."""
    mistakes = []
    for place, teacher in recipe.teachers.items():
        if teacher.sampled is None:
            continue
        if teacher.source == "auto":
            mistakes.append(f"`{place}.sampled` is for source 'cache'; a live teacher draws nothing")
        mistakes += [
            f"`{place}.sampled` gives the right gradient of losses linear in the teacher's probabilities, "
            f"which `objective.{name}` is not; use `forward_kl`, or `{place}.top_k`"
            for name in recipe.objective
            if MENU[name].family == "token" and MENU[name].needs_teacher and name != "forward_kl"
        ]
    return mistakes


def _curriculum(recipe: "Recipe") -> list[str]:
    """Weights of sources that say nothing, and difficulties that cannot be measured."""
    named, data = learned_from(recipe.data), recipe.data
    others = {"data.valid": data.valid, "data.test": data.test, "generate.examples": recipe.generate.examples}
    weights = {key: source.weight for key, source in named.items() if source.weight is not None}
    mistakes = [
        f"`{key}.weight` is a share of the rows to learn from, and these are none of them; drop it"
        for key, source in others.items()
        if source is not None and source.weight is not None
    ]
    if weights and len(named) == 1:
        [key] = named
        mistakes.append(f"`data.{key}.weight` is a share among sources, and there is one; drop it")
    elif len(weights) < len(named) and sum(weights.values()) >= 1:
        left = next(key for key in named if key not in weights)
        mistakes.append(
            f"`data`: the weights add up to {sum(weights.values()):g} and leave no rows for `data.{left}`, "
            "which has none; lower them, or give it one too"
        )
    options = recipe.train.curriculum
    if recipe.all_own and (weights or options is not None):
        what = "train.curriculum" if options else f"data.{next(iter(weights))}.weight"
        mistakes.append(
            f"`{what}` chooses among rows of the data, and the student learns from its own alone; lower "
            "`generate.on_policy.share`, or drop it"
        )
    if options is None:
        return mistakes
    by, known = f"`train.curriculum.by` {options.by}", type(options)(by=options.by)
    if options.by == "teacher_nll" and recipe.teacher is None:
        mistakes.append(f"{by} is measured under the teacher; name a `teacher`, or order by length")
    of_student = options.by == "student_loss" or (
        options.by == "teacher_nll" and "teacher" in recipe.self_taught
    )
    if of_student and recipe.student.shape is not None:
        mistakes.append(f"{by} is measured before training, when a new `student.shape` knows nothing yet")
    if options.by == "pass_rate" and not (
        data.prompts and recipe.generate.samples > 1 and recipe.generate.filters.verified
    ):
        mistakes.append(
            f"{by} is a share of right answers to `data.prompts`; it needs `generate.samples` of 2 or more "
            "and `generate.filters.verified`"
        )
    mistakes += [
        f"`train.curriculum.{key}` is for pace competence; {options.pace} has none"
        for key in ("start", "until")
        if options.pace != "competence" and getattr(options, key) != getattr(known, key)
    ]
    return mistakes


def _reasoning(recipe: "Recipe") -> list[str]:
    """Ways to learn from worked steps that a teacher's targets, or the student's own rows, do not go with."""
    options = recipe.data.reasoning
    if options is None or options.learn == "both":
        return []
    place = f"`data.reasoning.learn` {options.learn}"
    if recipe.all_own:
        return [
            f"{place} takes apart rows of the data, and the student learns from its own alone; lower "
            "`generate.on_policy.share`, or learn both"
        ]
    if options.learn != "two_tasks":
        return []
    return [
        f"{place} asks for the steps in a way that the student alone learns, so `objective.{name}` has no "
        "targets there; use `cross_entropy` alone, or learn both"
        for name in recipe.objective
        if MENU[name].needs_teacher
    ]


def _vocabulary(recipe: "Recipe") -> list[str]:
    """A smaller vocabulary that a teacher cannot have, or that no answer decides about."""
    prune, place = recipe.student.prune, "`student.prune.vocabulary`"
    if prune is None or not prune.vocabulary:
        return []
    mistakes = []
    if recipe.across_tokenizers:
        mistakes.append(
            f"{place} cuts the tokens of teacher and student alike, and `objective.cross_tokenizer` is for "
            "teachers with others; drop one of the two"
        )
    if recipe.data.train is None and not recipe.data.replay and recipe.generate.examples is None:
        mistakes.append(
            f"{place} keeps the tokens of the rows to learn from, and `data.prompts` alone show no answers, "
            "which would be written with the tokens of the questions; add `data.train` or `generate.examples`"
        )
    return mistakes


def _generation(recipe: "Recipe") -> list[str]:
    """Options for what somebody writes before training, where nobody does."""
    if recipe.data.prompts is not None and not recipe.all_own:
        return []
    known, given = Generate(), recipe.generate
    keys = ["samples", "keep", "temperature", "system", "examples", "thinking"]
    keys += ["filters"] if recipe.data.prompts is not None else []  # `_filters` says it better
    nobody = "and with `generate.on_policy.share` 1 nobody does"
    why = nobody if recipe.all_own else "which are missing"
    return [
        f"`generate.{key}` is for who answers `data.prompts`, {why}; leave it out"
        for key in keys
        if getattr(given, key) != getattr(known, key)
    ]


def _endpoint(recipe: "Recipe") -> list[str]:
    """A server that has nothing to answer, or is told what it cannot heed."""
    endpoint = recipe.generate.endpoint
    if endpoint is None:
        return []
    mistakes = []
    if recipe.data.prompts is None:
        mistakes.append("`generate.endpoint` answers `data.prompts`, which is missing")
    if not endpoint.chat:
        mistakes += [
            f"`generate.{key}` is a part of chats, and `generate.endpoint.chat` is false; leave it out"
            for key in ("system", "thinking")
            if getattr(recipe.generate, key) is not None
        ]
    return mistakes


def _self_taught(recipe: "Recipe") -> list[str]:
    """A new student cannot teach: it knows nothing, and may have no tokenizer."""
    if recipe.student.shape is None:
        return []
    mistakes = [
        f"`{place}.model` student is the student before training, and a new `student.shape` knows nothing "
        "then; load a `student.model`, or set `ema`"
        for place in recipe.self_taught
        if recipe.teachers[place].ema is None
    ]
    if "teacher" in recipe.self_taught and recipe.student.tokenizer is None:
        mistakes.append(
            "`teacher.model` student: a new `student.shape` has no tokenizer; add `student.tokenizer`"
        )
    return mistakes


def _on_policy(recipe: "Recipe") -> list[str]:
    """What the student's own rows cannot be judged by, and options that would act on no row."""
    own, place = recipe.generate.on_policy, "`generate.on_policy`"
    if own is None:
        return []
    if recipe.teacher is None:
        return [f"{place}: no one judges what the student writes; name a `teacher`"]
    mistakes = [
        f"{place}: the student's own rows are not known before, so `{teacher}.source` "
        f"{recipe.teachers[teacher].source} cannot hold what is said of them; use live"
        for teacher in recipe.teachers
        if recipe.teachers[teacher].source != "live"
    ]
    if recipe.across_tokenizers:
        mistakes.append(
            f"{place}: `objective.cross_tokenizer` aligns the rows of the data alone; drop one of the two"
        )
    elif not any(MENU[name].needs_teacher for name in recipe.objective):
        mistakes.append(f"{place}: no loss of `objective` asks the teacher about its rows; add `reverse_kl`")
    if recipe.all_own:
        mistakes += [
            f"`objective.{name}` takes labels for right, so it acts on rows of the data alone, and with "
            f"`generate.on_policy.share` 1 there are none; lower it, or drop the loss"
            for name in recipe.objective
            if MENU[name].on_labels
        ]
    if own.schedule == "adaptive" and not recipe.train.eval_every:
        mistakes.append(f"{place}: schedule adaptive follows the validation loss; set `train.eval_every`")
    return mistakes


def _policy_gradient(recipe: "Recipe") -> list[str]:
    """The policy gradient is one only on tokens drawn from the very distribution that it differentiates."""
    if "policy_gradient" not in recipe.objective:
        return []
    own, place = recipe.generate.on_policy, "`objective.policy_gradient`"
    if own is None:
        return [f"{place} judges tokens that the student wrote; set `generate.on_policy` {{share: 1.0}}"]
    wanted = {"share": 1.0, "buffer": 0, "schedule": "constant"}
    wanted |= {"temperature": 1.0, "top_k": None, "top_p": 1.0}
    mistakes = [
        f"{place} needs tokens drawn from the student as it is; set `generate.on_policy.{name}` to "
        f"{'null' if value is None else value}, not {getattr(own, name)}"
        for name, value in wanted.items()
        if getattr(own, name) != value
    ]
    if recipe.student.dropout:
        mistakes.append(
            f"{place}: with `student.dropout` another student writes than is differentiated; set it to 0"
        )
    mistakes += [
        f"{place}: the token that was written need not be among `{teacher}.top_k`; leave it out"
        for teacher, options in recipe.teachers.items()
        if options.top_k is not None
    ]
    return mistakes


def _filters(recipe: "Recipe") -> list[str]:
    """Filters that have nothing to look at, or that let nothing, or everything, through."""
    filters, most, place = recipe.generate.filters, recipe.generate.max_tokens, "generate.filters"
    if recipe.data.prompts is None and filters != Filters():
        return [f"`{place}` look at answers to `data.prompts`, which is missing"]
    mistakes = []
    if filters.min_tokens is not None and filters.min_tokens > min(most, filters.max_tokens or most):
        least = "generate.max_tokens" if filters.min_tokens > most else f"{place}.max_tokens"
        mistakes.append(f"`{place}.min_tokens` {filters.min_tokens} is more than `{least}`: no answer passes")
    if filters.perplexity is not None and filters.perplexity < 1:
        mistakes.append(f"`{place}.perplexity` {filters.perplexity:g}: none is less than 1")
    if filters.duplicates is not None and filters.duplicates < 0.3:
        mistakes.append(
            f"`{place}.duplicates` {filters.duplicates:g}: from 0.3 to 1; 0.8 finds copies with small changes"
        )
    return mistakes


def _rounded_teachers(recipe: "Recipe") -> list[str]:
    """A teacher in few bits that is the student, whose weights are to stay whole."""
    return [
        f"`{place}.quantize`: this teacher is the student, whose weights stay whole; leave it out, or name "
        "the model itself as teacher"
        for place in recipe.self_taught
        if recipe.teachers[place].quantize is not None
    ]


def _divided_teachers(recipe: "Recipe") -> list[str]:
    """A teacher held in parts, of which something is asked that only a whole one gives."""
    mistakes, prune = [], recipe.student.prune
    for place, options in recipe.teachers.items():
        if options.parallel is None:
            continue
        if prune is not None and (prune.vocabulary or (prune.model is None and place == "teacher")):
            mistakes.append(
                f"`{place}.parallel`: `student.prune` cuts a teacher, which takes a whole one; drop one"
            )
        if options.parallel == "pipeline" and any(MENU[name].family == "hidden" for name in recipe.objective):
            mistakes.append(
                f"`{place}.parallel` pipeline: no process sees the hidden states of all layers; use tensor"
            )
    return mistakes
