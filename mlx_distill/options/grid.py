"""Weights in few bits."""

from typing import Any, Literal, Self

from pydantic import (
    model_validator,
)

from mlx_distill.options.section import Bits, Section

MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits and group size, which are fixed there


def filled(section: Any) -> Any:
    """A section with the bits and the group size of its mode, if that fixes them."""
    if not isinstance(section, dict) or section.get("mode") not in MODES:
        return section
    bits, group_size = MODES[section["mode"]]
    return {"bits": bits, "group_size": group_size, **section}


def check_grid(mode: str, bits: int, group_size: int) -> None:
    """Refuse bits or groups that a mode does not have."""
    if mode in MODES and (bits, group_size) != MODES[mode]:
        bits, group_size = MODES[mode]
        raise ValueError(
            f"mode {mode} has {bits} bits and groups of {group_size}; leave `bits` and `group_size` out"
        )
    if mode == "affine" and group_size == 16:
        raise ValueError("mode affine has groups of 32, 64 or 128; got `group_size` 16")


class Grid(Section):
    """Weights in few bits, rounded to the nearest."""

    mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4"] = "affine"  # affine: a scale and a bias a group
    bits: Bits = 4
    group_size: Literal[16, 32, 64, 128] = 64  # weights that share a scale

    @model_validator(mode="before")
    @classmethod
    def fill_mode(cls, value: Any) -> Any:
        return filled(value)

    @model_validator(mode="after")
    def check_mode(self) -> Self:
        check_grid(self.mode, self.bits, self.group_size)
        return self
