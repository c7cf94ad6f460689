"""Bytes of the stages before and after training, and of what training does beside its steps."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from mlx_distill.cache.capture import NUMBERS, TOKENS
from mlx_distill.data.batch import PLACES_TO, Encoded, width_of
from mlx_distill.evaluate.fidelity import LOGITS
from mlx_distill.memory import batches
from mlx_distill.memory.batches import Shape
from mlx_distill.memory.kernels import Kernels
from mlx_distill.memory.models import Models
from mlx_distill.memory.parts import Parts
from mlx_distill.memory.sizes import Sizes
from mlx_distill.memory.work import left_over, measuring, over_shapes, reading, scoring, together, writing
from mlx_distill.prune.importance import BATCH_TOKENS
from mlx_distill.recipe import Recipe
from mlx_distill.score import NUMBERS as NUMBERS_READ

PROBED, LONGEST = 32, 512  # rows that a model is tried on, and tokens of each, as `probes.judging` has them
HELD_OUT = 0.05  # of the rows, as `quantize.learned` has it
WRITTEN = {"code", "summary", "exact", "humaneval", "mbpp"}  # tasks for which a model writes answers


class Rows(NamedTuple):
    """What is known of the data."""

    learned: Sequence[Encoded] = ()  # by the user's labels
    questions: Sequence[int] = ()  # tokens of each prompt
    valid: Sequence[Encoded] = ()
    test: Sequence[Encoded] = ()


def stages_of(
    recipe: Recipe, models: Models, rows: Rows, vocabulary: int, training: Parts, kernels: Kernels
) -> dict[str, Parts]:
    """Bytes of each stage but `train` at its largest; those without work of their own are left out.

    Args:
        training: bytes of the work on the largest batch of training, teachers' included.
    """
    found: dict[str, Parts] = {}
    student = models.student
    own = [one for place, one in models.teachers.items() if place not in recipe.self_taught]
    if own and (rows.learned or rows.valid):
        found["probes of teachers"] = _most(_probing(one, rows, vocabulary, kernels) for one in own)
    if rows.learned or rows.valid:
        read = _probing(student, rows, vocabulary, kernels)
        found["probes"] = read._replace(student=read.teachers, teachers=0.0)
    first = models.teachers.get("teacher")
    longest = recipe.data.max_tokens
    if rows.questions and recipe.generate.endpoint is None and not recipe.all_own and first is not None:
        options = recipe.generate
        count = min(options.batch_size, options.samples * len(rows.questions))
        prompt, answer = max(rows.questions), options.max_tokens
        work = _apart(vocabulary, lambda size: writing(first, size, count, prompt, answer, kernels))
        found["generate"] = Parts(teachers=first.bytes, **work)
    cached = [one for place, one in models.teachers.items() if recipe.teachers[place].source == "cache"]
    if cached:
        found["cache"] = _storing(cached, rows, vocabulary, longest, kernels)
    if models.source is not None:
        shape = Shape(max(1, BATCH_TOKENS // longest), longest, 0)
        whole = models.source
        work = reading(whole, shape, kernels)
        found["prune"] = Parts(student=whole.bytes + student.bytes, activations=work)
    if recipe.quantize is not None and recipe.quantize.method in ("dwq", "qad"):
        live = [one for place, one in models.teachers.items() if place == "teacher"] or [student]
        judged = rows.valid or rows.learned[: max(1, round(HELD_OUT * len(rows.learned)))]
        shapes = _measured(judged, vocabulary)

        def learning(size: int) -> float:
            step = training.activations + (training.logits if size else 0.0)
            return together([step, measuring([student, *live], size, shapes, kernels)], kernels)

        learned = _learning(recipe, student, kernels)
        work = _apart(vocabulary, learning)
        found["quantize"] = Parts(live[0].bytes, student.bytes, learned, **work)
    elif recipe.quantize is not None:
        work = reading(student, Shape(1, longest, 0), kernels)
        found["quantize"] = Parts(student=2 * student.bytes, activations=work)
    if recipe.evaluate.tasks:
        found["evaluate"] = _evaluating(recipe, student, first, rows, vocabulary, kernels)
    return {name: parts._replace(process=kernels.base) for name, parts in found.items()}


def _most(each: Iterable[Parts]) -> Parts:
    return max(each, key=lambda parts: parts.together)


def _apart(vocabulary: int, bytes_of: Callable[[int], float]) -> dict[str, float]:
    """Bytes of work by a vocabulary, in two parts: the logits are what it takes more than with none."""
    alone = bytes_of(0)
    return {"activations": alone, "logits": bytes_of(vocabulary) - alone}


def _probing(model: Sizes, rows: Rows, vocabulary: int, kernels: Kernels) -> Parts:
    """A model that reads some rows before the run begins."""
    known = rows.learned or rows.valid
    spread = [known[i * len(known) // PROBED] for i in range(PROBED)] if len(known) > PROBED else known
    read = [Encoded(row.tokens[:LONGEST], min(row.start, LONGEST)) for row in spread]
    shapes = batches.of_measuring(read, max(NUMBERS_READ // vocabulary, 64), PLACES_TO)
    work = _apart(vocabulary, lambda size: scoring(model, size, shapes, kernels))
    return Parts(teachers=model.bytes, **work)


def _storing(teachers: Sequence[Sizes], rows: Rows, vocabulary: int, longest: int, kernels: Kernels) -> Parts:
    """Teachers that read all rows, one after the other, with the logits of so many places at once."""
    width = width_of(longest + 1)
    shapes = [Shape(max(1, TOKENS // width), width, TOKENS)]
    if rows.learned:
        shapes = batches.of_measuring(rows.learned, TOKENS)
    chunk = max(1, NUMBERS // vocabulary)
    sizes = {min(chunk, shape.places) for shape in shapes}
    sizes |= {shape.places % chunk for shape in shapes if shape.places > chunk}
    copies = kernels.storing + left_over(vocabulary, kernels)
    logits = together([4.0 * places * vocabulary * copies for places in sizes], kernels)

    def stored(teacher: Sizes) -> Parts:
        read = over_shapes(shapes, lambda shape: reading(teacher, shape, kernels), kernels)
        return Parts(teachers=teacher.bytes, activations=read, logits=logits)

    return _most(stored(one) for one in teachers)


def validating(
    recipe: Recipe, models: Models, rows: Rows, vocabulary: int, met: Collection[int], kernels: Kernels
) -> float:
    """What measuring on `data.valid` takes while the student trains, beside the weights that are there.

    Args:
        met: tokens of the batches of training.
    """
    options = recipe.train
    adaptive = recipe.generate.on_policy is not None and recipe.generate.on_policy.schedule == "adaptive"
    if not rows.valid or not (0 < options.eval_every <= options.steps or adaptive):
        return 0.0
    live = recipe.teacher is not None and recipe.teacher.source != "cache" and not recipe.across_tokenizers
    measured = [models.student] + ([models.teachers.get("teacher", models.student)] if live else [])
    return measuring(measured, vocabulary, _measured(rows.valid, vocabulary), kernels, met)


def own_rows(recipe: Recipe, models: Models, rows: Rows, vocabulary: int, kernels: Kernels) -> float:
    """What an on-policy student takes while it writes a micro-batch."""
    options = recipe.generate.on_policy
    if options is None:
        return 0.0
    prompt = max((*rows.questions, *(row.start for row in rows.learned)), default=recipe.data.max_tokens)
    count = max(1, recipe.train.batch_tokens // width_of(prompt + options.max_tokens + 1))
    return writing(models.student, vocabulary, count, prompt, options.max_tokens, kernels)


def _learning(recipe: Recipe, student: Sizes, kernels: Kernels) -> float:
    """Weights in few bits that learn: what moves, its gradients and moments, and layers made anew."""
    options = recipe.quantize
    assert options is not None  # the caller asks only then
    moving = 2 * student.numbers / options.group_size if options.method == "dwq" else student.numbers
    if options.rank is not None:
        moving = student.layers * 2 * options.rank * (student.hidden + student.wide + student.queries)
    largest = 4.0 * max(student.hidden * student.wide, student.vocabulary * student.hidden)
    return 4.0 * moving * (4 + kernels.update_apart) + 3 * largest


def _evaluating(
    recipe: Recipe, student: Sizes, teacher: Sizes | None, rows: Rows, vocabulary: int, kernels: Kernels
) -> Parts:
    options = recipe.evaluate
    compared = [student] + ([teacher] if teacher is not None and not recipe.across_tokenizers else [])
    shapes = _measured(rows.test, vocabulary)
    largest = student if teacher is None or teacher.state < student.state else teacher
    prompt = max((row.start for row in rows.test), default=0)
    count = min(options.batch_size, len(rows.test))

    def work(size: int) -> float:
        each = [0.0]
        if "fidelity" in options.tasks:
            each.append(measuring(compared, size, shapes, kernels))
        if WRITTEN & {*options.tasks}:
            each.append(writing(largest, size, count, prompt, options.max_tokens, kernels))
        return together(each, kernels)

    held = 0.0 if teacher is None else teacher.bytes
    return Parts(teachers=held, student=student.bytes, **_apart(vocabulary, work))


def _measured(rows: Sequence[Encoded], vocabulary: int) -> list[Shape]:
    return batches.of_measuring(rows, min(4096, LOGITS // vocabulary))
