"""The models that one `quantize` section asks for: one for each width of its weights."""

from typing import NamedTuple

from mlx_distill.options import MODES, Grid, Quantize


class Level(NamedTuple):
    """One quantized model of a run."""

    name: str  # of its folder in `models/`, such as student-4bit
    options: Quantize
    grid: Grid  # what its weights are rounded to; with `mixed`: its mode and groups


def levels(options: Quantize | None) -> list[Level]:
    """What `options` asks for, the first width first; none without it."""
    if options is None:
        return []
    return [
        Level(
            name_of(options, bits),
            options,
            Grid(mode=options.mode, bits=bits, group_size=options.group_size),
        )
        for bits in dict.fromkeys(options.widths)
    ]


def name_of(options: Quantize, bits: int) -> str:
    """Folder of the model with these options: by its mode, its budget or its bits."""
    if options.mode in MODES:
        return f"student-{options.mode}"
    return "student-mixed" if options.gib is not None else f"student-{bits}bit"
