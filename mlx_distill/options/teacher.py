"""Who teaches."""

from typing import Literal, Self

from pydantic import (
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from mlx_distill.options.grid import Grid
from mlx_distill.options.section import Fraction, Section


class Teacher(Section):
    """A model that teaches. Its weights do not learn.

    The first one answers `data.prompts`, and is what the student is compared with. What `others` say is
    mixed into its targets.
    """

    model: str  # `embedded`, `student` (as it is before training), a folder, or a Hub repository
    ema: Fraction | None = None  # of `student`: share of its weights that a step keeps
    weight: PositiveFloat = 1.0  # of its targets, as a share of all teachers' weights
    quantize: Grid | None = None  # it teaches in few bits, to take less memory; null: as it is stored
    source: Literal["live", "cache", "auto"] = "live"  # auto: cache, if both do not fit
    top_k: PositiveInt | None = None  # likeliest tokens kept of each distribution; null: all
    tail: bool = True  # keep the mass of all other tokens too, as one more outcome
    sampled: PositiveInt | None = None  # cache: tokens drawn from each distribution, in place of `top_k`
    precision: Literal["compact", "exact"] = "compact"  # cache: log-probabilities in few bits, or float32
    parallel: Literal["tensor", "pipeline"] | None = None  # cache: held in parts by the ranks of `mlx.launch`
    cache: str | None = None  # folder of the cache, to share it between runs; null: in the run folder
    others: list[Self] = []  # more teachers, with these same options

    @model_validator(mode="after")
    def check(self) -> Self:
        cached = self.source != "live"
        if cached and self.top_k is None and self.sampled is None:
            raise ValueError(f"source {self.source!r} stores the likeliest tokens; set `top_k`, such as 64")
        if self.sampled is not None and (self.top_k is not None or not cached):
            raise ValueError("`sampled` stands in place of `top_k`, for source 'cache'; set one of the two")
        if self.cache is not None and not cached:
            raise ValueError("`cache` is a folder for source 'cache'; a live teacher stores nothing")
        if self.top_k is None and not self.tail:
            raise ValueError("`tail` is what `top_k` leaves over; without `top_k` there is none")
        if self.ema is not None and self.model != "student":
            raise ValueError(f"`ema` follows the student; it needs model 'student', not {self.model!r}")
        if self.ema is not None and cached:
            raise ValueError("`ema` changes at every step; it needs source 'live'")
        if self.parallel is not None and (self.source != "cache" or self.model == "student"):
            raise ValueError("`parallel` is for a model that fills a cache; it needs source 'cache'")
        if self.parallel is not None and self.quantize is not None:
            raise ValueError("`parallel` divides the weights as they are stored; leave `quantize` out")
        if any(other.others for other in self.others):
            raise ValueError("`others` stand in one list; they have no `others` of their own")
        return self
