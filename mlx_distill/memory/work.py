"""Bytes that work on a batch takes beside weights: what layers keep, what passes through, and logits."""

from collections.abc import Callable, Collection, Sequence

from mlx_distill.chunk_size import chunk_of
from mlx_distill.losses.layer_maps import layer_pairs
from mlx_distill.losses.menu import MENU, option
from mlx_distill.losses.sums import BLOCK
from mlx_distill.memory.batches import Shape
from mlx_distill.memory.kernels import Kernels
from mlx_distill.memory.models import Models
from mlx_distill.memory.sizes import Sizes
from mlx_distill.recipe import Recipe

# Arrays over the vocabulary that losses hold at once: a divergence from a live teacher (one by one), from
# what a teacher has stored, or a loss on labels.
ARRAYS = {
    "forward_kl": 7.1,
    "total_variation": 10.1,
    "reverse_kl": 11.1,
    "skewed_forward_kl": 13.3,
    "skewed_reverse_kl": 14.3,
    "adaptive_kl": 14.6,
    "jensen_shannon": 21.6,
}
FROM_STORED, ON_LABELS = 3.3, 4.2
ANOTHER = 3.0  # what each more of these two adds; beside a live teacher's it is lost among the others
HEAD = 1.2  # where the last projection moves
LIVING = 0.85  # share of work's arrays that live at its peak; the others were freed before


def activations(models: Models, recipe: Recipe, shape: Shape, kernels: Kernels) -> tuple[float, float]:
    """What the student keeps for the backward pass, and what its layer at work needs beside it."""
    student = models.student
    unit = shape.tokens * student.each
    layer = unit * _kept(student, shape.width)
    if models.scaled:
        layer += unit * (2 * student.hidden + student.queries + 2 * student.keys + 2 * student.wide)
    layers = models.adapted * student.layers
    if recipe.train.gradient_checkpointing:
        return kernels.kept * layers * unit * student.hidden, (kernels.kept + kernels.passing) * layer
    return kernels.kept * layers * layer, kernels.passing * layer


def _kept(model: Sizes, width: int) -> float:
    """Numbers a token that a layer keeps: what its norms read and give, and sums; queries, keys, values and
    what is made of them; the probabilities of attention; gate, up, and what is made of these."""
    attention = 4 * model.queries + 2 * model.keys + model.heads * width
    return 6 * model.hidden + attention + 5 * model.wide + 3 * model.routed


def reading(model: Sizes, shape: Shape, kernels: Kernels, beside: Sizes | None = None) -> float:
    """Bytes of a model that reads, beside its logits.

    Args:
        beside: a model at work on the same batch, with which it shares arrays of the same size.
    """
    attention, wide, hidden = kernels.reading
    numbers = 0.0
    if beside is None or beside.heads != model.heads:
        numbers += attention * model.heads * shape.width
    if beside is None or beside.wide != model.wide:
        numbers += wide * model.wide
    if beside is None or beside.hidden != model.hidden:
        numbers += hidden * model.hidden + model.routed
    return shape.tokens * model.each * numbers


def features(models: Models, recipe: Recipe, shape: Shape) -> float:
    """Hidden states and attention that losses compare, of student and teachers."""
    student, found = models.student, 0.0
    for name, term in recipe.objective.items():
        family = MENU[name].family
        if family == "exit":
            found += 4.0 * shape.places * 4 * student.hidden * len(term.options["exits"])
        if family not in ("hidden", "attention") or not student.layers:
            continue
        for teacher in (one for one in models.teachers.values() if one.layers):
            layers = option(name, term.options, "layers")
            pairs = layer_pairs(layers, student.layers, teacher.layers, embeddings=family == "hidden")
            if family == "hidden":
                found += 4.0 * shape.places * 4 * (student.hidden + teacher.hidden) * len(pairs)
            else:
                heads = student.heads + teacher.heads
                found += 4.0 * shape.tokens * 3 * heads * shape.width * len(pairs)
    return found


def logits(
    recipe: Recipe, vocabulary: int, live: int, shapes: Sequence[Shape], kernels: Kernels
) -> list[float]:
    """Arrays of a chunk, and of the last ones of batches, which are of other sizes: bytes of each size.

    Args:
        live: teachers whose logits stand beside the student's.
    """
    families = [MENU[name].family for name in recipe.objective]
    if not {"token", "exit", "spans"} & {*families}:
        return []
    exits = {
        layer
        for name, term in recipe.objective.items()
        if MENU[name].family == "exit"
        for layer in term.options["exits"]
    }
    beside = live if any(MENU[name].needs_teacher for name in recipe.objective) else 0
    chunk = chunk_of(recipe.train.logits_mib, vocabulary, logits=1 + len(exits) + beside)
    on_tokens = [name for name in recipe.objective if MENU[name].family == "token"]
    # The last chunk of a batch is smaller, and so are its arrays.
    sizes = {min(chunk, shape.places) for shape in shapes}
    sizes |= {shape.places % chunk for shape in shapes if shape.places > chunk}
    if beside:
        most = max([ARRAYS["forward_kl"], *(ARRAYS.get(name, 0.0) for name in on_tokens)])
        arrays = most * (1 + beside) / 2
    else:
        each = [FROM_STORED if name in ARRAYS else ON_LABELS for name in on_tokens]
        arrays = max(each, default=ON_LABELS) + ANOTHER * max(0, len(each) - 1)
    arrays += HEAD if recipe.student.method == "full" else 0.0
    arrays *= kernels.logits * (1 + 0.5 * len(exits))
    return [4.0 * vocabulary * places * arrays for places in sorted(sizes)]


def over_shapes(shapes: Sequence[Shape], bytes_of: Callable[[Shape], float], kernels: Kernels) -> float:
    """Work on batches of several shapes, one after the other.

    What grows with tokens alone has buffers of one size where batches have as many tokens, whatever their
    width; attention has its own.
    """
    tokens, attention = dict[int, float](), dict[int, float]()
    for shape in {shape[:2]: shape for shape in shapes}.values():
        flat = bytes_of(Shape(shape.tokens, 1, shape.places))
        tokens[shape.tokens] = flat
        attention[shape.tokens * shape.width] = bytes_of(shape) - flat
    largest = max(bytes_of(shape) for shape in shapes)
    return with_freed(largest, sum(tokens.values()) + sum(attention.values()), kernels)


def together(each: Sequence[float], kernels: Kernels) -> float:
    """Bytes of work done one after the other, of sizes that differ: the largest, and what was freed."""
    return with_freed(max(each, default=0.0), sum(each), kernels)


def with_freed(largest: float, whole: float, kernels: Kernels, living: float | None = None) -> float:
    """Bytes of work whose largest part takes so much, and all of it so much, as the allocator keeps them.

    It gives a freed array only to one of the same size, to 8 KiB, and keeps so many bytes beside what lives.

    Args:
        living: of the largest part, at most at a time; None: nearly all of it.
    """
    if living is None or not kernels.keeps:
        return max(largest, min(whole, LIVING * largest + kernels.keeps))
    return min(whole, living + kernels.keeps)


def measuring(
    models: Sequence[Sizes],
    vocabulary: int,
    shapes: Sequence[Shape],
    kernels: Kernels,
    met: Collection[int] = (),
) -> float:
    """A model whose logits over whole batches are compared with labels; with a teacher, if there are two.

    Args:
        met: tokens of batches that the same models have read before, and left arrays of those sizes behind.
    """
    copies = kernels.comparing if len(models) > 1 else kernels.measuring
    copies += left_over(vocabulary, kernels) * (4 if len(models) > 1 else 1)

    def bytes_of(shape: Shape) -> float:
        if kernels.keeps and shape.tokens in met:
            return 4.0 * shape.tokens * vocabulary * copies
        first, *others = models
        beside = [reading(one, shape, kernels, first) for one in others]
        read = together([reading(first, shape, kernels), *beside], kernels)
        return read + 4.0 * shape.tokens * vocabulary * copies

    return over_shapes(shapes, bytes_of, kernels) if shapes else 0.0


def scoring(model: Sizes, vocabulary: int, shapes: Sequence[Shape], kernels: Kernels) -> float:
    """A model that tells how likely the counted tokens of rows are."""
    whole, counted = kernels.scoring
    counted += left_over(vocabulary, kernels)

    def bytes_of(shape: Shape) -> float:
        return reading(model, shape, kernels) + 4.0 * shape.tokens * vocabulary * whole

    places = [4.0 * vocabulary * counted * places for places in {shape.places for shape in shapes}]
    read = [over_shapes(shapes, bytes_of, kernels), together(places, kernels)]
    most = max(bytes_of(shape) for shape in shapes) + max(places)
    return with_freed(most, sum(read), kernels)


def left_over(vocabulary: int, kernels: Kernels) -> float:
    """Copies of logits that sums over the vocabulary make, where its last block is smaller."""
    return kernels.left_over if vocabulary >= 2 * BLOCK and vocabulary % BLOCK else 0.0


def writing(model: Sizes, vocabulary: int, rows: int, prompt: int, answer: int, kernels: Kernels) -> float:
    """Answers of a batch: keys and values of every token, and logits of the last one."""
    tokens = prompt + answer
    prefill = reading(model, Shape(rows, prompt, rows), kernels)
    return kernels.written * rows * tokens * model.state + 4.0 * rows * vocabulary * kernels.drawing + prefill
