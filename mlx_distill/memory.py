"""How much memory teacher and student take together, estimated from files and shapes alone.

Weights, gradients and the optimizer's moments are counted; what the layers keep for the backward pass is a
rule of thumb, and so the whole is an estimate. It decides `source: auto`: a live teacher where all fits, a
stored one where it does not.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_distill.doctor import memory_gib
from mlx_distill.models.headers import Stored, config_of, stored_sizes
from mlx_distill.options import Shape, Student, Teacher
from mlx_distill.prune.axes import count_of, shapes_of
from mlx_distill.prune.plan import Planned
from mlx_distill.quantize.teacher import rounded_bytes
from mlx_distill.recipe import Recipe

GIB = 2**30
LOGITS = 18  # bytes that a loss holds for each logit of a chunk, as `train.COPIES` has it
SHARE = 0.75  # of the whole memory that a run may take, where the device does not say


class Estimate(NamedTuple):
    """GiB of each part of a training run."""

    weights: float  # of the student
    gradients: float
    moments: float  # of the optimizer
    activations: float  # of the student, kept for the backward pass
    logits: float
    teachers: dict[str, float]  # weights and activations of each, by its place; all of them live
    machine: float  # what the machine lends

    @property
    def student(self) -> float:
        return self.weights + self.gradients + self.moments + self.activations

    @property
    def together(self) -> float:
        return self.student + self.logits + sum(self.teachers.values())

    @property
    def fits(self) -> bool:
        return self.together <= self.machine


def estimate(
    recipe: Recipe, folders: Mapping[str, Path], vocabulary: int, planned: Planned | None = None
) -> Estimate:
    """What the recipe takes in training, with every teacher live that is not cached by choice.

    Args:
        folders: of the models that are loaded, by `student` and the teachers' places.
        vocabulary: real size of the tokenizer, for a student that is new.
        planned: the student, if it is to be cut out.
    """
    train, options = recipe.train, recipe.student
    sizes = {place: stored_sizes(folder) for place, folder in folders.items()}
    configs = {place: config_of(folder) for place, folder in folders.items()}
    if planned is not None:
        source, numbers = sizes["student"], count_of(planned.config)
        each = source.bytes / source.numbers
        sizes["student"] = Stored(int(numbers * each), numbers, shapes_of(planned.config))
        configs["student"] = planned.config
    if options.shape is not None:
        numbers = _numbers_of(options.shape, vocabulary)
        weights, config = 4.0 * numbers, options.shape.model_dump()
    else:
        tensors, config = sizes["student"], configs["student"]
        numbers, weights = float(tensors.numbers), float(tensors.bytes)
    if options.method == "full":
        moving, weights = numbers, 4.0 * numbers  # trained in float32, whatever they are stored in
    else:
        moving = _adapter_numbers(options, sizes["student"], config)
        weights += 4.0 * moving
    tokens, longest = train.batch_tokens, recipe.data.max_tokens
    layer = 4.0 * tokens * _floats_of_layer(config, min(longest, tokens))
    layers = _number(config, "num_hidden_layers")
    kept = layers * layer
    if train.gradient_checkpointing:
        kept = layer + 4.0 * tokens * layers * _number(config, "hidden_size")
    teachers = {}
    for place, teacher in recipe.teachers.items():
        shared = place in recipe.self_taught and teacher.ema is None and options.method != "full"
        if teacher.source == "cache" or shared:
            continue  # a student with adapters lends its own weights
        if place in recipe.self_taught:
            bytes_of, of = 4.0 * numbers, config
        else:
            bytes_of, of = float(sizes[place].bytes), configs[place]
        if teacher.quantize is not None:
            bytes_of = rounded_bytes(sizes[place], teacher.quantize)
        teachers[place] = (bytes_of + 2.0 * tokens * _floats_of_layer(of, min(longest, tokens))) / GIB
    return Estimate(
        weights / GIB,
        4.0 * moving / GIB,
        8.0 * moving / GIB,
        kept / GIB,
        min(train.logits_mib * 2.0**20, LOGITS * (1 + len(teachers)) * tokens * vocabulary) / GIB,
        teachers,
        machine_gib(),
    )


def machine_gib() -> float:
    """Memory that a run may take: what the GPU recommends, or else a share of all there is."""
    told = mx.device_info().get("max_recommended_working_set_size")
    return float(told) / GIB if told else SHARE * memory_gib()


def with_sources(recipe: Recipe, found: Estimate) -> Recipe:
    """The recipe with every `source: auto` decided: live if all fits together, else cache."""
    if recipe.teacher is None or all(one.source != "auto" for one in recipe.teachers.values()):
        return recipe
    chosen = "live" if found.fits else "cache"

    def decided(teacher: Teacher) -> Teacher:
        others = [decided(other) for other in teacher.others]
        changes: dict[str, Any] = {"others": others}
        if teacher.source == "auto":
            changes |= {"source": chosen} | ({"cache": None} if chosen == "live" else {})
        return teacher.model_copy(update=changes)

    return recipe.model_copy(update={"teacher": decided(recipe.teacher)})


def decisions(asked: Recipe, decided: Recipe, found: Estimate) -> list[str]:
    """A line for each `source: auto`: what it became, and why."""
    lines = []
    for place, teacher in asked.teachers.items():
        if teacher.source == "auto":
            source = decided.teachers[place].source
            fits = "fit" if source == "live" else "do not fit"
            lines.append(
                f"{place}.source: auto takes {source}; teacher and student {fits} together, at an estimated "
                f"{found.together:.2g} of {found.machine:.3g} GiB"
            )
    return lines


def breakdown(found: Estimate) -> str:
    """The estimate in a line."""
    parts = {"weights": found.weights, "gradients": found.gradients, "optimizer": found.moments}
    told = ", ".join(f"{name} {gib:.2g}" for name, gib in {**parts, "activations": found.activations}.items())
    others = {**found.teachers, "logits": found.logits}
    beside = ", ".join(f"{name} {gib:.2g}" for name, gib in others.items())
    return (
        f"memory, estimated: student {found.student:.2g} GiB ({told}), {beside}; "
        f"together {found.together:.2g} of {found.machine:.3g} GiB"
    )


def _adapter_numbers(options: Student, sizes: Stored, config: Mapping[str, Any]) -> float:
    """Numbers in the LoRA matrices beside every matrix of the last layers."""
    layers = _number(config, "num_hidden_layers") or 1
    share = min(1.0, (options.layers or layers) / layers)
    return share * options.rank * sum(rows + columns for rows, columns in sizes.matrices)


def _numbers_of(shape: Shape, vocabulary: int) -> float:
    """Weights of a new model."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    size = shape.head_dim or hidden // heads
    attention = hidden * size * (2 * heads + 2 * (shape.num_key_value_heads or heads))
    feed_forward = 3 * hidden * shape.intermediate_size
    if shape.num_experts is not None:
        feed_forward = shape.num_experts * (feed_forward + hidden)  # and a row of the router each
    layer = attention + feed_forward + 2 * hidden
    return shape.num_hidden_layers * layer + vocabulary * hidden * (1 if shape.tie_word_embeddings else 2)


def _floats_of_layer(config: Mapping[str, Any], longest: int) -> float:
    """Numbers a token that a layer holds at once: states, attention to all tokens before, feed-forward."""
    hidden = _number(config, "hidden_size")
    wide = _number(config, "moe_intermediate_size") or _number(config, "intermediate_size")
    wide *= _number(config, "num_experts_per_tok") or 1
    return 8 * hidden + 5 * wide + _number(config, "num_attention_heads") * longest


def _number(config: Mapping[str, Any], key: str) -> int:
    """A size in a config.json; 0 where it is told in a way of its own."""
    found = config.get(key, config.get("text_config", {}).get(key))
    return found if isinstance(found, int) else 0
