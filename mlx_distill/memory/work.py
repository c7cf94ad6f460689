"""Bytes that work on a batch takes beside weights: what layers keep, what passes through, and logits."""

from collections.abc import Callable, Sequence

from mlx_distill.chunk_size import chunk_of
from mlx_distill.losses.layer_maps import layer_pairs
from mlx_distill.losses.menu import MENU, option
from mlx_distill.memory.batches import Shape
from mlx_distill.memory.kernels import KEPT, Kernels, Layer
from mlx_distill.memory.models import Models
from mlx_distill.memory.sizes import Sizes
from mlx_distill.recipe import Recipe

OTHERS = 0.45  # share of such work whose buffers batches of as many tokens, but other rows, do not share
# Arrays over the vocabulary that a divergence from a live teacher holds, as multiples of forward_kl's, whose
# gradient is written out: measured one by one (docs/memory.md). MLX differentiates the others.
ARRAYS = {
    "forward_kl": 1.0,
    "total_variation": 1.5,
    "reverse_kl": 1.7,
    "skewed_forward_kl": 1.9,
    "skewed_reverse_kl": 2.0,
    "adaptive_kl": 2.1,
    "jensen_shannon": 3.2,
}
LIVING = 0.8  # share of work's arrays that live at its peak; the others were freed before


def activations(models: Models, recipe: Recipe, shape: Shape, kernels: Kernels) -> float:
    """What the student keeps for the backward pass, and what its layer at work needs beside it."""
    student, layers = models.student, models.adapted * models.student.layers
    layer = kernels.kept * shape.tokens * student.each * _kept(student, shape.width, kernels)
    passing = at_work(student, shape, kernels.passing)
    if recipe.train.gradient_checkpointing:
        return layer + passing + 0.4 * shape.tokens * student.each * layers * student.hidden
    return layers * layer + passing


def _kept(model: Sizes, width: int, kernels: Kernels) -> float:
    """Numbers a token that a layer keeps: norms and sums; queries, keys, values and what is made of them; the
    probabilities of attention; gate, up, and what is made of these."""
    attention = 4 * model.queries + 2 * model.keys + model.heads * width
    return kernels.norms * model.hidden + attention + 5 * model.wide


def at_work(model: Sizes, shape: Shape, layer: Layer) -> float:
    """Bytes of the layer that is computed."""
    attention, wide, hidden = layer
    numbers = attention * model.heads * shape.width + wide * model.wide + hidden * model.hidden
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


def logits(recipe: Recipe, vocabulary: int, live: int, shapes: Sequence[Shape], kernels: Kernels) -> float:
    """Arrays of one chunk, and of the last ones of batches, which are of other sizes.

    Args:
        live: teachers whose logits stand beside the student's.
    """
    families = [MENU[name].family for name in recipe.objective]
    if not {"token", "exit", "spans"} & {*families}:
        return 0.0
    exits = {
        layer
        for name, term in recipe.objective.items()
        if MENU[name].family == "exit"
        for layer in term.options["exits"]
    }
    beside = live if any(MENU[name].needs_teacher for name in recipe.objective) else 0
    chunk = chunk_of(recipe.train.logits_mib, vocabulary, logits=1 + len(exits) + beside)
    places = max(min(chunk, shape.places) for shape in shapes)
    if kernels.freed:
        places += sum({shape.places % chunk for shape in shapes if shape.places > chunk})
    most = max(ARRAYS.get(name, 1.0) for name in recipe.objective)
    copies = kernels.divergence * most * (1 + beside) / 2 if beside else kernels.loss
    return 4.0 * vocabulary * places * copies * (1 + 0.5 * len(exits))


def over_shapes(shapes: Sequence[Shape], bytes_of: Callable[[Shape], float], kernels: Kernels) -> float:
    """Work on batches of several shapes, one after the other.

    What grows with tokens alone has, for the most part, buffers of one size where batches have as many
    tokens, whatever their width; attention has its own.
    """
    tokens, attention = dict[int, list[float]](), dict[int, float]()
    for shape in {shape[:2]: shape for shape in shapes}.values():
        flat = bytes_of(Shape(shape.tokens, 1, shape.places))
        tokens.setdefault(shape.tokens, []).append(flat)
        attention[shape.tokens * shape.width] = bytes_of(shape) - flat
    flats = sum(max(same) + OTHERS * (sum(same) - max(same)) for same in tokens.values())
    largest = max(bytes_of(shape) for shape in shapes)
    return _with_freed(largest, flats + sum(attention.values()) - largest, kernels)


def together(each: Sequence[float], kernels: Kernels) -> float:
    """Bytes of work done one after the other, of sizes that differ: the largest, and what was freed."""
    largest = max(each, default=0.0)
    return _with_freed(largest, sum(each) - largest, kernels)


def _with_freed(largest: float, others: float, kernels: Kernels) -> float:
    """The largest work, and what others have left behind, as far as the allocator keeps it."""
    return max(largest, min(largest + kernels.freed * others, LIVING * largest + KEPT))


def measuring(models: Sequence[Sizes], vocabulary: int, shapes: Sequence[Shape], kernels: Kernels) -> float:
    """A model whose logits over whole batches are compared with labels; with a teacher, if there are two."""
    copies = kernels.comparing if len(models) > 1 else kernels.measuring

    def bytes_of(shape: Shape) -> float:
        return at_work(models[0], shape, kernels.reading) + 4.0 * shape.tokens * vocabulary * copies

    return over_shapes(shapes, bytes_of, kernels) if shapes else 0.0


def writing(model: Sizes, vocabulary: int, rows: int, prompt: int, answer: int, kernels: Kernels) -> float:
    """Answers of a batch: keys and values of every token, and logits of the last one."""
    tokens = prompt + answer
    prefill = at_work(model, Shape(rows, prompt, rows), kernels.reading)
    return kernels.written * rows * tokens * model.state + 4.0 * rows * vocabulary * kernels.drawing + prefill
