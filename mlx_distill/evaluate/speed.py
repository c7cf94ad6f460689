"""Speed, memory and energy of a model folder, in a fresh process that opens it as its users do.

`python -m mlx_distill.evaluate.speed FOLDER SCRATCH` is the child; `measure_speed` starts it. What the
numbers are: docs/speed.md.
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_distill.evaluate.energy import energy_meter, power_state
from mlx_distill.evaluate.fresh import Scratch, ask
from mlx_distill.models.headers import config_of

NAMES = (  # there for every length, if only as null; others are added where they were measured
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "time_to_first_token_ms",
    "peak_memory_gib",
    "joules_per_token",
)

Row = dict[str, Any]  # what was measured at one prompt length


def measure_speed(folder: Path, probe: list[int], lengths: Sequence[int]) -> dict[str, Any]:
    """Time, memory and energy of reading prompts and writing answers.

    Args:
        probe: token ids of which the prompts are made, repeated and cut to their length.
        lengths: tokens of the prompts, as `evaluate.prompt_lengths`.

    Returns:
        METRICS of `evaluation.json`: those of the first length, and under `speed` those of every length, with
        `prompt_tokens`. Null with `NAME_why` beside it where something cannot be measured.

    Raises:
        Fault: plain `mlx_lm.load` cannot open the folder.
    """
    asked = list(dict.fromkeys(lengths))
    if not asked:
        return not_measured("`evaluate.prompt_lengths` names no length")
    with tempfile.TemporaryDirectory() as made:
        request = {"probe": probe, "lengths": asked}
        found, why = ask("mlx_distill.evaluate.speed", folder, request, Scratch(Path(made)))
    if why:
        why = f"while {found['doing']}: {why}"
    rows = {row["prompt_tokens"]: row for row in found["rows"]}
    speed = [_filled(rows.get(length, {"prompt_tokens": length}), why) for length in asked]
    first = {name: value for name, value in speed[0].items() if name != "prompt_tokens"}
    return {**first, **found["about"], "speed": speed}


def not_measured(why: str, names: Sequence[str] = NAMES) -> dict[str, Any]:
    """Nulls with their reason: what is said of a model that cannot be opened from a folder."""
    return dict.fromkeys(names) | {f"{name}_why": why for name in names}


def _filled(row: Row, why: str) -> Row:
    """The row with a null and its reason for each name that is missing."""
    why = row.pop("why", why)
    return row | not_measured(why, [name for name in NAMES if name not in row])


def too_long(config: Mapping[str, Any], length: int, answer: int) -> str | None:
    """Why a prompt is too long for a model, if it is.

    An answer may pass the last position where positions are computed: its speed is no other there. Where they
    are looked up in a table (`n_positions` in config.json: gpt2, gpt_bigcode), it must not.
    """
    config = {**config, **(config.get("text_config") or {})}
    most, table = config.get("max_position_embeddings"), config.get("n_positions")
    if isinstance(most, int) and length > most:
        return f"{length} tokens are more than the {most} positions of the model"
    if isinstance(table, int) and length + answer > table:
        return f"{length} tokens and an answer of {answer} pass the {table} positions of the model"
    return None


def _child(folder: Path, scratch: Scratch) -> None:
    import mlx.core as mx
    import mlx_lm

    from mlx_distill.evaluate import joules, timing
    from mlx_distill.peak import resident

    request, base = scratch.request(), resident("VmRSS")
    model, *_ = mlx_lm.load(str(folder))
    config, about = config_of(folder), power_state()
    rows: dict[int, Row] = {length: {"prompt_tokens": length} for length in request["lengths"]}

    def tell(now: str, found: Mapping[int, Row] | None = None) -> None:
        """Keep what was found, and say what comes now."""
        for length, row in (found or {}).items():
            rows[length] |= row
        scratch.answer({"doing": now, "rows": list(rows.values()), "about": about})

    prompts = {}
    for length in sorted(rows):  # for the memory, the one that needs least goes first
        tell(f"it read {length} tokens")
        prompt = mx.array((request["probe"] * length)[:length])
        why = too_long(config, length, timing.ANSWER)
        try:
            if why is None:
                work = partial(timing.one_generation, model, prompt)
                rows[length] |= timing.peak_memory(work, base)
                prompts[length] = prompt
        except RuntimeError as error:  # MLX's, of more memory than there is
            why = f"{type(error).__name__}: {error}"[:300]
        if why is not None:
            rows[length]["why"] = why
    prompts = {length: prompts[length] for length in rows if length in prompts}
    tell("it was timed")
    tell("its energy was measured", timing.timed(model, prompts))
    found, more = joules.energies(model, prompts, energy_meter())
    about.update(more)
    tell("it ended", found)


if __name__ == "__main__":
    _child(Path(sys.argv[1]), Scratch(Path(sys.argv[2])))
