"""What is learned from, and how."""

from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from mlx_distill.options.section import Fraction, Section, Share


class Term(Section):
    """One loss of the objective: its weight and the options of its function."""

    weight: PositiveFloat = 1.0
    options: dict[str, Any] = {}


class Curriculum(Section):
    """Which rows come when, by how difficult they are."""

    by: Literal["length", "teacher_nll", "student_loss", "pass_rate"]  # what makes a row difficult
    pace: Literal["sorted", "competence", "weighted"] = "competence"  # see docs/curriculum.md
    reverse: bool = False  # the difficult ones first
    start: Share = 0.1  # competence: share of the rows that is drawn from at first
    until: Share = 0.5  # competence: share of the steps after which all are


class Train(Section):
    """The loop. A step is one finished optimizer update."""

    steps: PositiveInt
    batch_tokens: PositiveInt = Field(4096, le=2**24)  # tokens of one forward pass, padding included
    micro_batches: PositiveInt = 1  # forward passes added up into one update
    learning_rate: PositiveFloat = 1e-5  # peak
    warmup: NonNegativeInt = 0  # steps from 0 up to the peak
    final_learning_rate: NonNegativeFloat = Field(0.1, le=1)  # end of the cosine, a share of the peak
    weight_decay: NonNegativeFloat = 0.01  # AdamW; matrices only
    beta2: Fraction = 0.999  # AdamW
    clip: NonNegativeFloat = 1.0  # largest norm of the gradient; 0 turns it off
    skip_nonfinite: NonNegativeInt = 3  # steps in a row without finite numbers; one more ends the run
    spike: NonNegativeFloat = 6.0  # deviations above the median loss that are told; 0 turns it off
    gradient_checkpointing: bool = False  # recompute layers in the backward pass, to save memory
    logits_mib: PositiveInt = 384  # memory for logits and losses on them: sets how many places at a time
    memory_gib: PositiveFloat | None = None  # that MLX may take; null: its own limit
    compile: bool = True
    curriculum: Curriculum | None = None  # null: rows in random order
    log_every: NonNegativeInt = 20  # steps; 0 turns it off, here and below
    eval_every: NonNegativeInt = 0
    save_every: NonNegativeInt = 200
    keep: PositiveInt = 2  # newest checkpoints of a stage that stay
    log_to: list[Literal["tensorboard", "wandb", "trackio"]] = []  # where metrics.jsonl is also written
